// The gateway as a pod runs it: a process with only the given environment. Owns its output and its end.

import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';

import { bareEnvironment } from './bare-environment.ts';
import { waitFor } from './wait-for.ts';

const main = join(import.meta.dirname, '../../gateway/src/main.ts');

/** A running gateway, which its starter ends. */
export interface GatewayProcess {
  readonly child: ChildProcess;
  /** What it wrote: log lines and errors. */
  readonly lines: readonly string[];
  /** Resolves with its exit code and signal, once all that it wrote has been read. */
  readonly exited: Promise<unknown[]>;
  /** Waits until it serves; gives the address of its door. */
  address(): Promise<string>;
}

/** Starts a gateway. */
export function startGatewayProcess(env: Readonly<Record<string, string>>): GatewayProcess {
  const child = spawn(process.execPath, [main], {
    env: { ...bareEnvironment, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const lines: string[] = [];
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => lines.push(...text.trimEnd().split('\n')));
  }
  const address = async (): Promise<string> => {
    let found: unknown;
    await waitFor('the gateway to be ready', () => {
      const ready = lines.find((line) => line.includes('"gateway ready"'));
      found = ready === undefined ? undefined : (JSON.parse(ready) as { address?: unknown }).address;
      return typeof found === 'string';
    });
    return String(found);
  };
  return { child, lines, exited: once(child, 'close'), address };
}
