import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { redactStatus } from './redaction.ts';

const pod = (value: string) => ({
  kind: 'Pod',
  metadata: { name: 'chat-3fe2-0' },
  spec: { containers: [{ name: 'rank-0', env: [{ name: 'GIVEN', value }, { name: 'FROM' }] }] },
});

describe('redactStatus', () => {
  it('withholds every text about a Secret, and keeps the code and the reason', () => {
    const body = { kind: 'Secret', data: { 'keys.json': 'bWFya2Vy' } };
    const status = {
      code: 422,
      reason: 'Invalid',
      message: 'bWFy',
      details: { causes: [{ message: 'bWFy' }] },
    };
    expect(redactStatus(status, { body, credentials: [] })).toEqual({
      code: 422,
      message: 'Invalid (more is withheld, it may quote the Secret)',
    });
  });

  it('blanks out credentials, wherever they are quoted', () => {
    const status = { code: 502, message: 'upstream got authorization: Bearer token-of-ours' };
    expect(redactStatus(status, { credentials: ['token-of-ours', ''] }).message).toBe(
      'upstream got authorization: Bearer ***',
    );
  });

  it('keeps short values, and values that are also names in the object', () => {
    const status = { code: 403, message: 'pod chat-3fe2-0 of 4 ranks is forbidden' };
    for (const value of ['4', 'chat-3fe2-0', '']) {
      expect(redactStatus(status, { body: pod(value), credentials: [] })).toEqual(status);
    }
  });

  it('blanks out the value of any variable', () => {
    const quoted = fc.string({ minLength: 8, unit: 'binary' });
    fc.assert(
      fc.property(quoted, fc.string(), (value, around) => {
        fc.pre(!JSON.stringify(pod('')).includes(JSON.stringify(value).slice(1, -1)));
        const status = {
          code: 422,
          message: `${around}${value}${around}`,
          details: { causes: [{ message: value }] },
        };
        const redacted = redactStatus(status, { body: pod(value), credentials: [] });
        expect(redacted.details?.causes).toEqual([{ message: '***' }]);
        expect(redacted.message).toContain('***');
      }),
    );
  });
});
