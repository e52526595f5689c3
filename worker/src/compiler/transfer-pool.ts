// Runs transfer jobs on a few threads at once. Owns the threads' lifetime; knows neither the work of a job nor its
// record.

import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { ClusterError } from '@mimo/core/process/errors';
import type { TransferAnswer } from './compile-thread.ts';
import type { TransferJob } from './transfer.ts';

/** Jobs, the number of threads that share them, and a callback for each finished job. */
export interface TransferRun {
  readonly jobs: readonly TransferJob[];
  readonly threads: number;
  readonly onDone: (job: TransferJob) => Promise<void>;
}

/** Runs every job. The first failure, or the signal, ends all threads and is thrown once they have ended. */
export async function runTransfers(
  { jobs, threads, onDone }: TransferRun,
  signal: AbortSignal,
): Promise<void> {
  signal.throwIfAborted();
  const failure = new AbortController();
  const stop = AbortSignal.any([signal, failure.signal]);
  const next = jobs.values();
  const runThread = async (): Promise<void> => {
    const thread = new Worker(new URL(import.meta.resolve('@mimo/worker/compiler/compile-thread')));
    try {
      for (const job of next) {
        thread.postMessage(job);
        const [answer]: TransferAnswer[] = await once(thread, 'message', { signal: stop });
        if (answer !== undefined) {
          throw new ClusterError(answer.code, answer.message);
        }
        await onDone(job);
      }
    } catch (error) {
      failure.abort(error);
      throw error;
    } finally {
      await thread.terminate();
    }
  };
  const count = Math.min(threads, jobs.length);
  const results = await Promise.allSettled(Array.from({ length: count }, runThread));
  if (results.some(({ status }) => status === 'rejected')) {
    throw ClusterError.from(stop.reason);
  }
}
