import { createHash } from 'node:crypto';

import { describe, expect, it } from 'vitest';

import { assertMayUse, authenticateNobody, loadKeys, parseKeys } from './auth.ts';

const sha256 = createHash('sha256').update('key-of-b').digest('hex');
const authenticate = parseKeys(
  {
    keys: [
      { key: 'key-of-a', tenant: 'a' },
      { sha256, tenant: 'b', models: ['m1'] },
    ],
  },
  'keys.json',
);

describe('parseKeys', () => {
  it('finds the tenant of a key, given plainly or as a hash', () => {
    expect(authenticate('Bearer key-of-a')).toEqual({ tenant: 'a', models: undefined });
    expect(authenticate('bearer  key-of-b')).toEqual({ tenant: 'b', models: new Set(['m1']) });
  });

  it.each([
    undefined,
    '',
    'key-of-a',
    'Basic key-of-a',
    'Bearer',
    'Bearer ',
    'Bearer key-of-c',
    `Bearer ${sha256}`,
  ])('does not let in %s', (authorization) => {
    expect(() => authenticate(authorization)).toThrow(expect.objectContaining({ code: 'unauthenticated' }));
  });

  it.each([
    ['no keys', {}],
    ['a key and its hash', { keys: [{ key: 'key-of-a', sha256, tenant: 'a' }] }],
    ['neither', { keys: [{ tenant: 'a' }] }],
    ['a hash that is none', { keys: [{ sha256: 'abc', tenant: 'a' }] }],
    ['a key that is too short', { keys: [{ key: 'short', tenant: 'a' }] }],
    ['no tenant', { keys: [{ key: 'key-of-a' }] }],
    ['a misspelt field', { keys: [{ key: 'key-of-a', tenant: 'a', model: ['m'] }] }],
  ])('refuses a file with %s', (_name, json) => {
    expect(() => parseKeys(json, 'keys.json')).toThrow(/^the keys file keys\.json/);
  });
});

describe('loadKeys', () => {
  it('says which file it cannot read, and none of what is in it', async () => {
    await expect(loadKeys('/nowhere/keys.json')).rejects.toMatchObject({
      code: 'invalid_argument',
      message: 'the keys file /nowhere/keys.json cannot be read as JSON',
    });
  });
});

describe('assertMayUse', () => {
  it('holds a caller to the models of its key', () => {
    expect(() => assertMayUse(authenticate('Bearer key-of-b'), 'm2')).toThrow(
      /tenant b may not use model m2/,
    );
    assertMayUse(authenticate('Bearer key-of-b'), 'm1');
    assertMayUse(authenticate('Bearer key-of-a'), 'm2');
    assertMayUse(authenticateNobody(undefined), 'm2');
  });
});
