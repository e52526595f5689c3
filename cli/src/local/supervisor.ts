// Keeps a set of child processes running that live and die together: one goes, the others are taken down, and all are
// started again after a growing pause, unless one reports that its settings cannot work. Owns that rule and nothing
// else; does not know what the processes are.
//
// Why no library: respawn and PM2 restart each process by itself, concurrently either restarts one or ends all, and PM2
// runs its own daemon. The ranks of a group must be restarted together, in new settings each time (ports, a
// token), and never after exit code 78.

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { unusableExitCode } from '@mimo/core/process/run-process';

import type { Child } from './child-process.ts';

/** How a set of processes is kept running. */
export interface SupervisorOptions {
  /** Names the set in events and errors. */
  readonly name: string;
  /** Starts one life: all processes, or it throws and leaves none running. `life` counts from 1. */
  readonly start: (life: number) => Promise<readonly Child[]>;
  /** A line for the user about each loss. */
  readonly onEvent: (line: string) => void;
  /** How long the processes may take to exit by themselves when the set is stopped. */
  readonly stopGraceMs: number;
}

const minPauseMs = 200;
const maxPauseMs = 10_000;
/** A life of this length counts as good, and so does one that ended in order: the pause is then reset. */
const goodLifeMs = 10_000;
/** After this many bad lives in a row the set is given up. */
const maxBadLives = 5;
/** The other processes of a set that lost one have nothing left to finish. */
const lossGraceMs = 2_000;

/** A running set. Stop it. */
export class Supervisor {
  /** Rejects when the set is given up, with the end of the log of the process that failed. */
  readonly givenUp: Promise<never>;
  readonly #options: SupervisorOptions;
  readonly #stopping = new AbortController();
  readonly #done: Promise<void>;
  #children: readonly Child[] = [];
  #life = 0;

  private constructor(options: SupervisorOptions, first: readonly Child[]) {
    this.#options = options;
    const { promise, reject } = Promise.withResolvers<never>();
    this.givenUp = promise;
    promise.catch(() => undefined);
    this.#done = this.#run(first).catch(reject);
  }

  /** Starts the first life; rejects if that fails. */
  static async start(options: SupervisorOptions): Promise<Supervisor> {
    return new Supervisor(options, await options.start(1));
  }

  /** The processes of the present life; those of the last one between two lives. */
  get children(): readonly Child[] {
    return this.#children;
  }

  /** Lives begun, this one included. */
  get life(): number {
    return this.#life;
  }

  /** Stops the processes, all at once, and starts none again. Idempotent. */
  async stop(): Promise<void> {
    this.#stopping.abort();
    await Promise.all(this.#children.map((child) => child.stop(this.#options.stopGraceMs)));
    await this.#done;
  }

  async #run(first: readonly Child[]): Promise<void> {
    const { name, onEvent } = this.#options;
    let pauseMs = minPauseMs;
    let badLives = 0;
    for (let next: readonly Child[] | undefined = first; ; next = undefined) {
      const begin = performance.now();
      this.#children = next ?? (await this.#options.start(this.#life + 1));
      this.#life += 1;
      if (this.#stopping.signal.aborted) {
        await Promise.all(this.#children.map((child) => child.stop(lossGraceMs)));
        return;
      }
      const lost = await Promise.race(
        this.#children.map(async (child) => ({ child, exit: await child.exited })),
      );
      if (this.#stopping.signal.aborted) {
        return;
      }
      await Promise.all(this.#children.map((child) => child.stop(lossGraceMs)));
      const exits = await Promise.all(
        this.#children.map(async (child) => ({ child, exit: await child.exited })),
      );
      const unusable = exits.find(({ exit }) => exit.code === unusableExitCode);
      if (unusable !== undefined) {
        const text = `${name} cannot start:\n${lastWords(unusable.child.logTail())}`;
        throw new ClusterError('failed_precondition', text);
      }
      const isGood = performance.now() - begin >= goodLifeMs || lost.exit.code === 0;
      badLives = isGood ? 0 : badLives + 1;
      pauseMs = isGood ? minPauseMs : Math.min(pauseMs * 2, maxPauseMs);
      const how = lost.exit.signal ?? `exit code ${lost.exit.code}`;
      if (badLives >= maxBadLives) {
        throw new ClusterError('unavailable', `${name} does not stay up (${how}):\n${lost.child.logTail()}`);
      }
      onEvent(`${name} lost ${lost.child.name} (${how}): starting it again`);
      await pause(pauseMs, this.#stopping.signal);
      if (this.#stopping.signal.aborted) {
        return;
      }
    }
  }
}

/** The text for people that a process wrote after its last log line. */
function lastWords(log: string): string {
  const lines = log.trimEnd().split('\n');
  const words = lines.slice(lines.findLastIndex((line) => line.startsWith('{')) + 1);
  return words.length === 0 ? log : words.join('\n');
}
