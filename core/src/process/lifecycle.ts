// The life of a process: starting -> ready -> draining -> closed. Owns the order: parts are opened one after another;
// drain steps run one after another within the grace period; then every part is closed, the last first. Does not know
// what the steps do. run-process.ts gives every process its lifecycle.

import { ClusterError } from './errors.ts';
import type { Log } from './log.ts';

export type LifecycleState = 'starting' | 'ready' | 'draining' | 'closed';

interface Closable {
  close(): Promise<void> | void;
}

type Step = { readonly name: string; readonly run: (signal: AbortSignal) => Promise<void> | void };

/** Time limit of each close step, so that a hanging step does not block the others. */
const closeStepMs = 5_000;

/** Collects drain and close steps, and runs them once. */
export class Lifecycle {
  readonly #log: Log;
  readonly #graceMs: number;
  readonly #draining = new AbortController();
  readonly #closing = new AbortController();
  readonly #over = Promise.withResolvers<ClusterError>();
  readonly #drainSteps: Step[] = [];
  readonly #closeSteps: Step[] = [];
  #state: LifecycleState = 'starting';
  #stopped: Promise<void> | undefined;

  constructor(options: { readonly log: Log; readonly graceMs: number }) {
    this.#log = options.log;
    this.#graceMs = options.graceMs;
  }

  get state(): LifecycleState {
    return this.#state;
  }

  /** Fires when draining begins: accept no new work. */
  get draining(): AbortSignal {
    return this.#draining.signal;
  }

  /** Fires when the grace period is over or every drain step is done: release everything. */
  get closing(): AbortSignal {
    return this.#closing.signal;
  }

  /** Resolves with the reason when a part has reported that the process cannot continue. */
  get over(): Promise<ClusterError> {
    return this.#over.promise;
  }

  /** Reports that the process cannot continue. The code `canceled` means that it ends as intended. */
  end(reason: ClusterError): void {
    this.#over.resolve(reason);
  }

  /** Gives back a part that was just opened, to be closed after every part that is opened later. */
  opened<Part extends Closable>(name: string, part: Part): Part {
    this.onClose(name, () => part.close());
    return part;
  }

  /** Adds a step that finishes current work; its signal fires when the grace period is over. */
  onDrain(name: string, run: (signal: AbortSignal) => Promise<void> | void): void {
    this.#drainSteps.push({ name, run });
  }

  /** Adds a step that closes something. The last added runs first. Failures are logged and do not stop the others. */
  onClose(name: string, run: () => Promise<void> | void): void {
    this.#closeSteps.push({ name, run });
  }

  /** Marks the process as ready. */
  ready(): void {
    if (this.#state === 'starting') {
      this.#state = 'ready';
    }
  }

  /** Drains for at most `graceMs`, and closes; calling it again waits for the same end. Never rejects. */
  stop(reason: string, graceMs = this.#graceMs): Promise<void> {
    this.#stopped ??= this.#stop(reason, graceMs);
    return this.#stopped;
  }

  async #stop(reason: string, graceMs: number): Promise<void> {
    this.#state = 'draining';
    this.#log.info({ reason, graceMs }, 'draining');
    const canceled = new ClusterError('canceled', `stopping: ${reason}`);
    this.#draining.abort(canceled);
    const grace = setTimeout(() => this.#closing.abort(canceled), graceMs);
    for (const step of this.#drainSteps) {
      await this.#attempt(step, this.#closing.signal);
    }
    clearTimeout(grace);
    this.#closing.abort(canceled);
    for (const step of this.#closeSteps.toReversed()) {
      await this.#attempt(step, AbortSignal.timeout(closeStepMs));
    }
    this.#state = 'closed';
    this.#log.info({ reason }, 'closed');
  }

  async #attempt(step: Step, limit: AbortSignal): Promise<void> {
    const over = Promise.withResolvers<'over'>();
    const end = (): void => over.resolve('over');
    if (limit.aborted) {
      end();
    }
    limit.addEventListener('abort', end, { once: true });
    const running = Promise.resolve()
      .then(() => step.run(limit))
      .catch((error: unknown) => {
        this.#log.error({ error: ClusterError.from(error), step: step.name }, 'step failed');
      });
    if ((await Promise.race([running, over.promise])) === 'over') {
      this.#log.warn({ step: step.name }, 'step did not finish in time');
    }
    limit.removeEventListener('abort', end);
  }
}
