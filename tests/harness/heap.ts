// How much of a Node process is live: its heap after a full collection, read through the inspector that SIGUSR1
// starts. For processes with `heapEnv` in their environment and a log file of their standard error.

import { once } from 'node:events';
import { readFile } from 'node:fs/promises';

import { waitFor } from './wait-for.ts';

/** The inspector of each process uses a separate port. */
export const heapEnv = { NODE_OPTIONS: '--inspect-port=0' } as const;

export interface Heap {
  /** Bytes of objects and of buffers outside the heap that are still referenced. */
  liveBytes(): Promise<number>;
}

/** Starts the inspector of a process. It listens on loopback until the process ends. */
export async function openHeap({ pid, logFile }: { pid: number; logFile: string }): Promise<Heap> {
  process.kill(pid, 'SIGUSR1');
  let url = '';
  await waitFor('the inspector to listen', async () => {
    url = /Debugger listening on (ws:\S+)/.exec(await readFile(logFile, 'utf8'))?.[1] ?? '';
    return url !== '';
  });
  return { liveBytes: () => readLiveBytes(url) };
}

async function readLiveBytes(url: string): Promise<number> {
  const socket = new WebSocket(url);
  await once(socket, 'open');
  try {
    const call = async (method: string, params: object = {}): Promise<string> => {
      socket.send(JSON.stringify({ id: 1, method, params }));
      const [event] = (await once(socket, 'message')) as [{ readonly data: string }];
      return (
        (JSON.parse(event.data) as { result: { result?: { value: string } } }).result.result?.value ?? ''
      );
    };
    // What the first leaves to finalizers, the second frees.
    await call('HeapProfiler.collectGarbage');
    await call('HeapProfiler.collectGarbage');
    const { heapUsed, external } = JSON.parse(
      await call('Runtime.evaluate', { expression: 'JSON.stringify(process.memoryUsage())' }),
    ) as NodeJS.MemoryUsage;
    return heapUsed + external;
  } finally {
    socket.close();
    await once(socket, 'close');
  }
}
