// The host's side of gpu-draws.ts, on a separate thread: makes rows, and repeats the device's draws on the host.

import { parentPort } from 'node:worker_threads';
import { chooseToken } from '@mimo/worker/engines/mimo/head-rows';
import type { SampledToken } from '@mimo/worker/runtime/kernel';
import { drawOf, fillRow, type RowKind } from './draw-cases.ts';

/** One row's work. */
export interface DrawCheck {
  readonly do: 'fill' | 'check';
  readonly rows: Float32Array;
  readonly rowLength: number;
  readonly row: number;
  readonly kind: RowKind;
  readonly salt: number;
  /** `check`: ids of the row that exist, and the device's answers to its requests in turn. */
  readonly usable?: number;
  readonly answers?: readonly SampledToken[];
}

export interface DrawVerdict {
  draws: number;
  /** Of another id, or of another logit. */
  different: number;
  worstLogprob: number;
  /** Lists of log-probabilities that hold other ids. */
  differentTops: number;
  examples: unknown[];
}

function check({ rows, rowLength, row, kind, salt, usable = 0, answers = [] }: DrawCheck): DrawVerdict {
  const verdict: DrawVerdict = { draws: 0, different: 0, worstLogprob: 0, differentTops: 0, examples: [] };
  const source = rows.subarray(row * rowLength, row * rowLength + usable);
  const scratch = new Float32Array(usable);
  for (const [index, answer] of answers.entries()) {
    const draw = drawOf(kind, salt, index, usable);
    scratch.set(source);
    const host = chooseToken(scratch, draw);
    verdict.draws += 1;
    const isFinite = Number.isFinite(host.logit);
    const isSame = isFinite
      ? host.tokenId === answer.tokenId && host.logit === answer.logit
      : !Number.isFinite(answer.logit);
    if (!isSame) {
      verdict.different += 1;
      const { tokenId, logit } = host;
      verdict.examples.push({
        kind,
        salt,
        index,
        host: { tokenId, logit },
        device: answer,
        sampling: draw.sampling,
      });
    }
    if (isFinite && host.logprob !== undefined) {
      const [ours = [], theirs = []] = [host, answer].map(({ logprob }) => logprob?.top);
      verdict.differentTops +=
        ours.map(({ tokenId }) => tokenId).join() === theirs.map(({ tokenId }) => tokenId).join() ? 0 : 1;
      const pairs = [
        [host.logprob.logprob, answer.logprob?.logprob ?? NaN],
        ...ours.map(({ logprob }, place) => [logprob, theirs[place]?.logprob ?? NaN]),
      ];
      const errors = pairs.map(([a = 0, b = NaN]) => Math.abs(a - b) / Math.max(1, Math.abs(a)));
      verdict.worstLogprob = Math.max(verdict.worstLogprob, ...errors);
    }
  }
  return verdict;
}

parentPort?.on('message', (job: DrawCheck) => {
  if (job.do === 'fill') {
    fillRow(job.rows.subarray(job.row * job.rowLength, (job.row + 1) * job.rowLength), job.kind, job.salt);
  }
  parentPort?.postMessage(job.do === 'check' ? check(job) : { draws: 0 });
});
