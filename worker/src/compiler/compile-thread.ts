// Entry of a compile thread: runs the transfer jobs that its parent posts, one at a time, and answers each with
// undefined or the error. Knows neither the model nor the order of jobs.

import { parentPort } from 'node:worker_threads';
import { ClusterError } from '@mimo/core/process/errors';
import { createTransferrer, type TransferJob } from './transfer.ts';

/** The answer to one job: undefined, or its error. */
export type TransferAnswer = { readonly code: ClusterError['code']; readonly message: string } | undefined;

const transferrer = createTransferrer();
parentPort?.on('message', (job: TransferJob) => {
  let answer: TransferAnswer;
  try {
    transferrer.run(job);
  } catch (error) {
    const { code, message } = ClusterError.from(error);
    answer = { code, message };
  }
  parentPort?.postMessage(answer);
});
