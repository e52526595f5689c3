// Default sizes of an engine by its execution provider, each with a reason for the log.

import type { ExecutionProvider } from '../../runtime/runtime.ts';

export type Size = 'maxSequences' | 'prefillChunkTokens' | 'maxBatchTokens';

/** The settings, as the worker passes them. */
export type GivenSizes = { readonly [Name in Size]?: number | 'auto' };

export interface ChosenSize {
  readonly value: number;
  readonly reason: string;
}

type Defaults = Readonly<Record<Size, ChosenSize>>;

const forProcessors: Defaults = {
  maxSequences: {
    value: 16,
    reason: 'products on processors are bound by arithmetic: more at once wait longer',
  },
  prefillChunkTokens: {
    value: 64,
    reason: 'as efficient as 256 or 512 rows, and keeps the steps of others short',
  },
  maxBatchTokens: { value: 128, reason: 'two chunks' },
};

const defaults: Readonly<Record<ExecutionProvider, Defaults>> = {
  cpu: forProcessors,
  webgpu: forProcessors,
  // Measured on an H200, 2026-11 (docs/lab/gpu.md).
  cuda: {
    maxSequences: { value: 256, reason: '256 sequences decode in 3 times the step of one' },
    prefillChunkTokens: { value: 512, reason: 'larger chunks read a prompt no faster' },
    maxBatchTokens: { value: 2048, reason: 'four chunks keep a GPU busy beside 256 sequences with drafts' },
  },
};

/** All three, with room for a draft of every sequence in a step, and no chunk larger than a step. */
export function chooseSizes(given: GivenSizes, provider: ExecutionProvider): Defaults {
  const ours = defaults[provider];
  const choose = (name: Size, bound: (value: number) => number, because: string): ChosenSize => {
    const asked = given[name] ?? 'auto';
    if (asked !== 'auto') {
      return { value: asked, reason: 'set' };
    }
    const { value, reason } = ours[name];
    const bounded = bound(value);
    return { value: bounded, reason: bounded === value ? `${provider}: ${reason}` : because };
  };
  const maxSequences = choose('maxSequences', (value) => value, '');
  const maxBatchTokens = choose(
    'maxBatchTokens',
    (value) => Math.max(value, 2 * maxSequences.value),
    'two rows for each of maxSequences',
  );
  const prefillChunkTokens = choose(
    'prefillChunkTokens',
    (value) => Math.min(value, maxBatchTokens.value),
    'no more than maxBatchTokens',
  );
  return { maxSequences, prefillChunkTokens, maxBatchTokens };
}
