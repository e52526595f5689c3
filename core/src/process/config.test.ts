import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  addressSetting,
  booleanSetting,
  choiceSetting,
  durationSetting,
  integerSetting,
  listSetting,
  mapSetting,
  parseConfig,
  natsServersSetting,
  printableConfig,
  secretSetting,
  sizeSetting,
  textSetting,
  type Setting,
} from './config.ts';
import { ClusterError } from './errors.ts';

const settings = {
  listenAddress: addressSetting('MIMO_TEST_LISTEN', '0.0.0.0:50051'),
  graceMs: durationSetting('MIMO_TEST_GRACE', '30s'),
  cacheBytes: sizeSetting('MIMO_TEST_CACHE'),
  level: choiceSetting('MIMO_TEST_LEVEL', ['low', 'high'], 'low'),
  token: secretSetting('MIMO_TEST_TOKEN', ''),
};

const rules = {
  prefix: 'MIMO_TEST_',
  settings,
  check: (config: { graceMs: number }) =>
    config.graceMs > 60_000 ? ['MIMO_TEST_GRACE must be at most 60s'] : [],
};

function problemsOf(env: Record<string, string>): string[] {
  try {
    parseConfig(rules, env);
    return [];
  } catch (error) {
    return ClusterError.from(error).message.split('\n  ').slice(1);
  }
}

describe('parseConfig', () => {
  it('fills in defaults, and freezes the result', () => {
    const config = parseConfig(rules, { MIMO_TEST_CACHE: '16Gi', PATH: '/bin' });
    expect(config).toEqual({
      listenAddress: '0.0.0.0:50051',
      graceMs: 30_000,
      cacheBytes: 16 * 2 ** 30,
      level: 'low',
      token: '',
    });
    expect(Object.isFrozen(config)).toBe(true);
  });

  it('lists every problem in one error, with name, expectation and value', () => {
    const env = {
      MIMO_TEST_LISTEN: 'nowhere',
      MIMO_TEST_GRACE: '30',
      MIMO_TEST_LEVEL: 'mid',
      MIMO_TEST_GRCE: '1s',
    };
    expect(problemsOf(env)).toEqual([
      'MIMO_TEST_LISTEN must be host:port with a port from 0 to 65535, not "nowhere"',
      'MIMO_TEST_GRACE must be a duration such as 250ms, 30s, 5m or 24h, not "30"',
      'MIMO_TEST_CACHE is missing',
      'MIMO_TEST_LEVEL must be one of low, high, not "mid"',
      'MIMO_TEST_GRCE is not a setting of this process',
    ]);
  });

  it('checks rules across fields once each field is valid', () => {
    expect(problemsOf({ MIMO_TEST_CACHE: '1', MIMO_TEST_GRACE: '2m' })).toEqual([
      'MIMO_TEST_GRACE must be at most 60s',
    ]);
  });

  it('treats an empty variable as unset', () => {
    expect(problemsOf({ MIMO_TEST_CACHE: '1', MIMO_TEST_GRACE: '' })).toEqual([]);
  });

  it('ignores variables that Kubernetes injects for a Service named like the process', () => {
    const injected = {
      MIMO_TEST_SERVICE_HOST: '10.0.0.1',
      MIMO_TEST_SERVICE_PORT: '50051',
      MIMO_TEST_SERVICE_PORT_GRPC: '50051',
      MIMO_TEST_PORT: 'tcp://10.0.0.1:50051',
      MIMO_TEST_PORT_50051_TCP: 'tcp://10.0.0.1:50051',
      MIMO_TEST_PORT_50051_TCP_ADDR: '10.0.0.1',
    };
    expect(problemsOf({ MIMO_TEST_CACHE: '1', ...injected })).toEqual([]);
  });

  it('never shows a secret', () => {
    const strict = {
      ...secretSetting('MIMO_TEST_TOKEN'),
      parse: () => {
        throw new RangeError('must be longer');
      },
    };
    const config = parseConfig(rules, { MIMO_TEST_CACHE: '1', MIMO_TEST_TOKEN: 'hush' });
    expect(printableConfig(settings, config)).toMatchObject({ token: '***', level: 'low' });
    const failing = (): unknown =>
      parseConfig({ prefix: 'MIMO_TEST_', settings: { token: strict } }, { MIMO_TEST_TOKEN: 'hush' });
    expect(failing).toThrow('MIMO_TEST_TOKEN must be longer, not ***');
  });
});

describe('natsServersSetting', () => {
  it('prints the servers without their credentials', () => {
    const table = { servers: natsServersSetting('X') };
    const { servers } = parseConfig(
      { prefix: 'X', settings: table },
      { X: 'nats://user:pass@a:4222,token@b:4222,c:4222' },
    );
    expect(servers[0]).toBe('nats://user:pass@a:4222');
    expect(printableConfig(table, { servers })).toEqual({
      servers: ['nats://***@a:4222', '***@b:4222', 'c:4222'],
    });
    expect(() => parseConfig({ prefix: 'X', settings: table }, { X: 'nats://user:pass@a,' })).toThrow(
      'not "nats://***@a,"',
    );
  });
});

describe('settings', () => {
  const cases: readonly [Setting<unknown>, string, unknown][] = [
    [durationSetting('X'), '250ms', 250],
    [durationSetting('X'), '5m', 300_000],
    [durationSetting('X'), '24h', 86_400_000],
    [sizeSetting('X'), '512Mi', 536_870_912],
    [sizeSetting('X'), '7', 7],
    [integerSetting('X', { min: -1, max: 9 }), '-1', -1],
    [booleanSetting('X'), 'true', true],
    [booleanSetting('X'), 'false', false],
    [addressSetting('X'), '[::1]:0', '[::1]:0'],
    [addressSetting('X', ''), '', ''],
    [listSetting('X'), 'a, b', ['a', 'b']],
    [mapSetting('X', ''), '', new Map()],
    [
      mapSetting('X'),
      'a=/x, b=y=z',
      new Map([
        ['a', '/x'],
        ['b', 'y=z'],
      ]),
    ],
    [mapSetting('X'), '{"a,b":"/c=d"}', new Map([['a,b', '/c=d']])],
    [textSetting('X'), 'any text', 'any text'],
  ];
  it.each(cases)('%o reads %s', (setting, text, value) => {
    expect(setting.parse(text)).toEqual(value);
  });

  const bad: readonly [Setting<unknown>, string][] = [
    [durationSetting('X'), '1.5s'],
    [durationSetting('X'), '-1s'],
    [sizeSetting('X'), '16GB'],
    [integerSetting('X', { min: 0, max: 9 }), '10'],
    [integerSetting('X', { min: 0, max: 9 }), '1e0'],
    [booleanSetting('X'), 'yes'],
    [addressSetting('X'), 'host:65536'],
    [addressSetting('X'), 'host'],
    [addressSetting('X'), ''],
    [addressSetting('X'), '::1:80'],
    [listSetting('X'), 'a,,b'],
    [mapSetting('X'), 'a=/x,b'],
    [mapSetting('X'), 'a=/x,a=/y'],
    [mapSetting('X'), '=/x'],
    [mapSetting('X'), 'a='],
    [mapSetting('X'), '{"a":1}'],
    [mapSetting('X'), '{"a":"/x"'],
    [mapSetting('X'), '{"":"/x"}'],
  ];
  it.each(bad)('%o refuses %s', (setting, text) => {
    expect(() => setting.parse(text)).toThrow(/^(must be|one of)/);
  });

  it('reads a map of any names and texts from JSON', () => {
    const some = fc.string({ unit: 'binary', minLength: 1 });
    fc.assert(
      fc.property(fc.dictionary(some, some), (texts) => {
        const map = mapSetting('X').parse(JSON.stringify(texts));
        expect([...map]).toEqual(Object.entries(texts));
      }),
    );
  });
});
