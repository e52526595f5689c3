// The thread that tokenises long prompts: entry point of a worker_thread, started and stopped by prompt-encoder.ts. Takes
// one checked prompt a message and answers each with one reply, in order.

import { parentPort, workerData } from 'node:worker_threads';

import { ClusterError } from '@mimo/core/errors';

import type { PromptInput } from './admission.ts';
import { loadPromptEncoder, type EncodeReply } from './prompt-encoder.ts';

const { directory } = workerData as { readonly directory: string };
const loading = loadPromptEncoder(directory);

async function encode(input: PromptInput): Promise<EncodeReply> {
  try {
    const encoder = await loading;
    return encoder.encodeHere(input);
  } catch (error) {
    const { code, message } = ClusterError.from(error);
    return { code, message };
  }
}

parentPort?.on('message', (input: PromptInput) => {
  void encode(input).then((reply) => parentPort?.postMessage(reply));
});
