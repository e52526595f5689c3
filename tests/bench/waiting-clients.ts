// Clients of a benchmark, in a separate process: `node waiting-clients.ts ADDRESS MODEL COUNT BYTES` opens COUNT
// chats with a prompt of BYTES, writes `waiting` once all of them have started, and holds them until its standard
// input ends.

import * as grpc from '@grpc/grpc-js';

import { callServerStream } from '@mimo/core/grpc/client';
import { ChatRequest, InferenceServiceClient, InferenceServiceService, Role } from '@mimo/proto/inference';

const [address = '', model = '', count = '', bytes = ''] = process.argv.slice(2);
const streamsPerConnection = 50;
const atOnce = 100;

const signal = new AbortController();
process.stdin.resume().once('end', () => signal.abort());

function connect(): InferenceServiceClient {
  return new InferenceServiceClient(address, grpc.credentials.createInsecure(), {
    'grpc.use_local_subchannel_pool': 1,
  });
}

const words = 'What is the sum of these numbers and why should one care about it at all? ';
const clients: InferenceServiceClient[] = [];
let started = 0;
const begin = async (index: number): Promise<void> => {
  const client = (clients[Math.floor(index / streamsPerConnection)] ??= connect());
  const content = `${index} ${words.repeat(Number(bytes) / words.length + 1)}`.slice(0, Number(bytes));
  const messages = [{ role: Role.USER, content }];
  const request = ChatRequest.fromPartial({ model, messages, sampling: { maxTokens: 16 } });
  const stream = callServerStream(client, InferenceServiceService.chat, { request, signal: signal.signal });
  const first = await stream.next();
  if (first.done !== true) {
    started += 1;
    stream.next().catch(() => undefined);
  }
};

for (let at = 0; at < Number(count); at += atOnce) {
  const batch = Array.from({ length: Math.min(atOnce, Number(count) - at) }, (_, index) => begin(at + index));
  await Promise.all(batch);
}
console.log('waiting', started);
