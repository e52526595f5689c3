import { describe, expect, it } from 'vitest';

import { parseWorkerConfig } from './config.ts';

const minimal = { MIMO_WORKER_MODEL: 'm', MIMO_WORKER_SHARD_DIRECTORY: '/shards' };

describe('parseWorkerConfig', () => {
  it('fills in every default', () => {
    expect(parseWorkerConfig(minimal)).toMatchObject({
      precision: 'int8',
      tensorParallel: 1,
      rank: 0,
      heartbeatIntervalMs: 250,
      kvBytes: 'auto',
      drainGraceMs: 25_000,
      drainFinishMs: 10_000,
      draftTokens: 1,
      adaptiveSpeculation: true,
    });
  });

  it.each([
    ['no model', { MIMO_WORKER_MODEL: undefined }, 'MIMO_WORKER_MODEL is missing'],
    ['no weights', { MIMO_WORKER_SHARD_DIRECTORY: undefined }, 'exactly one of'],
    ['two kinds of weights', { MIMO_WORKER_CHECKPOINT_DIRECTORY: '/model' }, 'exactly one of'],
    [
      'a checkpoint without a cache',
      { MIMO_WORKER_SHARD_DIRECTORY: undefined, MIMO_WORKER_CHECKPOINT_DIRECTORY: '/model' },
      'MIMO_WORKER_CACHE_DIRECTORY must be set',
    ],
    ['a rank outside the group', { MIMO_WORKER_RANK: '1' }, 'below MIMO_WORKER_TENSOR_PARALLEL (1), not 1'],
    [
      'too few peers',
      { MIMO_WORKER_TENSOR_PARALLEL: '2', MIMO_WORKER_PEERS: 'a:1' },
      'must name 2 addresses',
    ],
    [
      'a peer without a port',
      { MIMO_WORKER_TENSOR_PARALLEL: '2', MIMO_WORKER_PEERS: 'a:1,b' },
      'entries must be host:port, not "b"',
    ],
    [
      'an invalid repository name',
      { MIMO_WORKER_HUB_REPOSITORY: '../a' },
      'must be organisation/name, not "../a"',
    ],
    ['a hub that is no URL', { MIMO_WORKER_HUB_ENDPOINT: 'hub' }, 'MIMO_WORKER_HUB_ENDPOINT must be a URL'],
    ['an unreachable address', { MIMO_WORKER_NATS_URL: 'nats://n' }, 'MIMO_WORKER_ADVERTISE must be set'],
    ['an unknown precision', { MIMO_WORKER_PRECISION: 'fp8' }, 'one of fp32, fp16, bf16, int8, int4'],
    [
      'a drain without time to hand over',
      { MIMO_WORKER_DRAIN_GRACE: '5s', MIMO_WORKER_DRAIN_FINISH: '5s' },
      'MIMO_WORKER_DRAIN_FINISH (5000 ms) must be below MIMO_WORKER_DRAIN_GRACE (5000 ms)',
    ],
    [
      'an unknown setting',
      { MIMO_WORKER_TENSOR_PARALEL: '2' },
      'MIMO_WORKER_TENSOR_PARALEL is not a setting',
    ],
  ])('refuses %s', (_, changes, message) => {
    expect(() => parseWorkerConfig({ ...minimal, ...changes })).toThrow(message);
  });

  it('requires a checkpoint of prepare, but no addresses', () => {
    const env = { ...minimal, MIMO_WORKER_NATS_URL: 'nats://n', MIMO_WORKER_TENSOR_PARALLEL: '2' };
    expect(() => parseWorkerConfig(env, 'prepare')).toThrow(
      'MIMO_WORKER_SHARD_DIRECTORY needs no preparation',
    );
    const checkpoint = {
      MIMO_WORKER_SHARD_DIRECTORY: undefined,
      MIMO_WORKER_CHECKPOINT_DIRECTORY: '/model',
      MIMO_WORKER_CACHE_DIRECTORY: '/cache',
    };
    expect(parseWorkerConfig({ ...env, ...checkpoint }, 'prepare')).toMatchObject({ hubRevision: 'main' });
  });
});
