// Network groups of real processes for tests: starts them, sends them messages, and ends all of them with the test.

import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import type { EngineOptions, SequenceDelta, SequenceRequest } from '@mimo/worker/engines/mimo/engine-host';
import type { RankRequest, RankResponse } from './engine-rank.ts';

/** One rank's process. */
export class RankProcess {
  readonly process: ChildProcess;
  readonly deltas: SequenceDelta[] = [];
  readonly #responses: RankResponse[] = [];
  #wake = Promise.withResolvers<void>();

  constructor(options: EngineOptions, env: NodeJS.ProcessEnv = process.env) {
    this.process = fork(new URL('engine-rank.ts', import.meta.url), [JSON.stringify(options)], { env });
    this.process.on('message', (response: RankResponse) => {
      this.#responses.push(response);
      this.deltas.push(...(response.kind === 'frame' ? response.frame.deltas : []));
      this.#wake.resolve();
      this.#wake = Promise.withResolvers();
    });
  }

  send(request: RankRequest): void {
    this.process.send(request);
  }

  submit(request: SequenceRequest): void {
    this.send({ kind: 'submit', request });
  }

  /** The first response of one of these kinds, past or to come. */
  async response<Kind extends RankResponse['kind']>(
    ...kinds: Kind[]
  ): Promise<Extract<RankResponse, { kind: Kind }>> {
    for (;;) {
      const found = this.#responses.find((response) => (kinds as string[]).includes(response.kind));
      if (found !== undefined) {
        return found as Extract<RankResponse, { kind: Kind }>;
      }
      await this.#wake.promise;
    }
  }

  /** The deltas of a sequence, once it has ended. */
  async ended(sequenceId: number): Promise<readonly SequenceDelta[]> {
    for (;;) {
      const deltas = this.deltas.filter((delta) => delta.sequenceId === sequenceId);
      if (deltas.some(({ finish }) => finish !== undefined)) {
        return deltas;
      }
      await this.#wake.promise;
    }
  }

  /** Resolves when the process is gone. */
  async kill(): Promise<void> {
    if (this.process.exitCode === null && this.process.signalCode === null) {
      const exit = once(this.process, 'exit');
      this.process.kill('SIGKILL');
      await exit;
    }
  }
}
