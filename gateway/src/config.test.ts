import { describe, expect, it } from 'vitest';

import { parseGatewayConfig } from './config.ts';

const enough = { MIMO_GATEWAY_MODELS: 'mimo=/models/mimo', MIMO_GATEWAY_NATS: 'nats://127.0.0.1:4222' };

describe('parseGatewayConfig', () => {
  it('accepts models and a queue, and fills in every default', () => {
    expect(parseGatewayConfig(enough)).toMatchObject({
      listenAddress: '0.0.0.0:50051',
      models: new Map([['mimo', '/models/mimo']]),
      natsUrls: ['nats://127.0.0.1:4222'],
      maxWaitMs: 600_000,
      clientStallMs: 300_000,
      maxReceiveBytes: 16 * 2 ** 20,
    });
  });

  it('needs no models when the queue has a catalogue', () => {
    expect(parseGatewayConfig({ MIMO_GATEWAY_NATS: 'nats://127.0.0.1:4222' }).models.size).toBe(0);
  });

  it.each([
    [{ MIMO_GATEWAY_WORKERS: '127.0.0.1:1' }, /MIMO_GATEWAY_MODELS must name at least one model/],
    [
      { ...enough, MIMO_GATEWAY_MODELS: 'mimo' },
      /MIMO_GATEWAY_MODELS must be name=text between commas, or a JSON object .*, not "mimo"/,
    ],
    [{ ...enough, MIMO_GATEWAY_NATS: '' }, /MIMO_GATEWAY_WORKERS must name at least one worker/],
    [{ ...enough, MIMO_GATEWAY_WORKERS: '127.0.0.1:1' }, /it must be empty/],
    [{ ...enough, MIMO_GATEWAY_TYPO: '1' }, /MIMO_GATEWAY_TYPO is not a setting/],
  ])('refuses %o', (env, problem) => {
    expect(() => parseGatewayConfig(env)).toThrow(problem);
  });
});
