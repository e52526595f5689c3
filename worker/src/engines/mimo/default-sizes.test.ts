import { describe, expect, it } from 'vitest';
import { chooseSizes } from './default-sizes.ts';

describe('chooseSizes', () => {
  it('defaults unset sizes by the execution provider, with a reason', () => {
    for (const [provider, sizes] of [
      ['cuda', [256, 512, 2048]],
      ['cpu', [16, 64, 128]],
      ['webgpu', [16, 64, 128]],
    ] as const) {
      const chosen = chooseSizes({ maxSequences: 'auto' }, provider);
      const { maxSequences, prefillChunkTokens, maxBatchTokens } = chosen;
      expect([maxSequences.value, prefillChunkTokens.value, maxBatchTokens.value]).toEqual(sizes);
      for (const { reason } of Object.values(chosen)) {
        expect(reason.startsWith(`${provider}: `)).toBe(true);
      }
    }
  });

  it('keeps sizes that are set', () => {
    const chosen = chooseSizes({ maxSequences: 3, prefillChunkTokens: 100, maxBatchTokens: 7 }, 'cuda');
    expect(chosen).toEqual({
      maxSequences: { value: 3, reason: 'set' },
      prefillChunkTokens: { value: 100, reason: 'set' },
      maxBatchTokens: { value: 7, reason: 'set' },
    });
  });

  it('fits unset sizes to the set ones', () => {
    expect(chooseSizes({ maxSequences: 2000 }, 'cuda').maxBatchTokens).toEqual({
      value: 4000,
      reason: 'two rows for each of maxSequences',
    });
    expect(chooseSizes({ maxBatchTokens: 40 }, 'cpu').prefillChunkTokens).toEqual({
      value: 40,
      reason: 'no more than maxBatchTokens',
    });
  });
});
