// A client in a separate process, which a test stops for a while: it keeps streams running, makes many calls at once
// beside them, and cancels those on request. Run with the gateway's address; reports over IPC.

import type { ChatRequest } from '@mimo/proto/inference';

import { chatRequest, createClient } from './cluster.ts';
import { expectStreams, startStreams, type StreamsOutcome } from './disturbed-streams.ts';

/** What it reports: all calls have been made; all have ended, and how many of the burst were canceled. */
export type ClientReport =
  | { readonly kind: 'open' }
  | { readonly kind: 'ended'; readonly outcome: StreamsOutcome; readonly canceled: number };

/** More than a window of HTTP/2 holds of all streams together, so that writes to a client that stands still wait. */
const maxTokens = 600;
const burstCalls = 500;

const [, , address = ''] = process.argv;
const report = (message: ClientReport): boolean => process.send!(message);
const client = createClient(address);
const expected = await expectStreams(client, maxTokens);
const { begun, outcome } = startStreams(client, expected);
await begun;
const request: ChatRequest = chatRequest('Count.', { ignoreEos: true, maxTokens });
const burst = Array.from({ length: burstCalls }, () => {
  const call = client.chat(request);
  const ended = new Promise<boolean>((resolve) => {
    call.on('error', ({ details }: { readonly details: string }) =>
      resolve(details === 'Cancelled on client'),
    );
    call.on('end', () => resolve(false));
  });
  call.resume();
  return { call, ended };
});
process.once('message', () => burst.forEach(({ call }) => call.cancel()));
report({ kind: 'open' });
const ends = await Promise.all(burst.map(({ ended }) => ended));
report({ kind: 'ended', outcome: await outcome, canceled: ends.filter(Boolean).length });
client.close();
process.disconnect?.();
