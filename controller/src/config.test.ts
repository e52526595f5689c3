import { describe, expect, it } from 'vitest';

import { parseControllerConfig, workerSettingsOf } from './config.ts';

const enough = {
  MIMO_CONTROLLER_NAMESPACE: 'models',
  MIMO_CONTROLLER_NATS_URLS: 'nats://queue:4222',
  MIMO_CONTROLLER_WORKER_IMAGE: 'worker:1',
};

describe('parseControllerConfig', () => {
  it('requires a namespace, a queue and an image, and fills in the rest', () => {
    const settings = workerSettingsOf(parseControllerConfig(enough));
    expect(settings).toMatchObject({
      image: 'worker:1',
      cudaImage: 'worker:1',
      natsUrl: 'nats://queue:4222',
      cache: { kind: 'pod' },
      podDefaults: { serviceAccountName: '', imagePullSecrets: [] },
    });
  });

  it('reads where accelerated pods run', () => {
    const config = parseControllerConfig({
      ...enough,
      MIMO_CONTROLLER_ACCELERATOR_RUNTIME_CLASS: 'nvidia',
      MIMO_CONTROLLER_ACCELERATOR_NODE_SELECTOR: 'pool=gpu, example.com/class=',
      MIMO_CONTROLLER_ACCELERATOR_TOLERATIONS: 'nvidia.com/gpu:NoSchedule, pool=gpu, spot=:NoExecute',
    });
    expect(workerSettingsOf(config).podDefaults?.accelerated).toEqual({
      runtimeClassName: 'nvidia',
      nodeSelector: { pool: 'gpu', 'example.com/class': '' },
      tolerations: [
        { key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' },
        { key: 'pool', operator: 'Equal', value: 'gpu' },
        { key: 'spot', operator: 'Equal', value: '', effect: 'NoExecute' },
      ],
    });
  });

  it.each([
    [{}, /MIMO_CONTROLLER_NAMESPACE is missing/],
    [{ ...enough, MIMO_CONTROLLER_NATS_URLS: '' }, /MIMO_CONTROLLER_NATS_URLS is missing/],
    [
      { ...enough, MIMO_CONTROLLER_CACHE_VOLUME_CLAIM: 'a', MIMO_CONTROLLER_CACHE_HOST_PATH: '/a' },
      /exclude each other/,
    ],
    [{ ...enough, MIMO_CONTROLLER_CACHE_HOST_PATH: 'a' }, /must begin with \//],
    [{ ...enough, MIMO_CONTROLLER_ACCELERATOR_NODE_SELECTOR: 'gpu' }, /must hold label=value, not "gpu"/],
    [
      { ...enough, MIMO_CONTROLLER_ACCELERATOR_TOLERATIONS: 'a:Never' },
      /must hold key\[=value\]\[:effect\], not "a:Never"/,
    ],
  ])('refuses %o', (env, problem) => {
    expect(() => parseControllerConfig(env)).toThrow(problem);
  });
});
