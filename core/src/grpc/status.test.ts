import * as grpc from '@grpc/grpc-js';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ClusterError, errorTable, type ErrorCode } from '../process/errors.ts';
import { errorFromStatus, statusFromError } from './status.ts';

/** As grpc-js hands a status to a client. */
function asServiceError(error: unknown): Error {
  return Object.assign(new Error('14 UNAVAILABLE'), statusFromError(error));
}

describe('statusFromError and errorFromStatus', () => {
  it.each(Object.keys(errorTable) as ErrorCode[])('convert %s there and back', (code) => {
    const error = errorFromStatus(asServiceError(new ClusterError(code, 'the text')));
    expect(error.code).toBe(code);
    expect(error.message === 'the text').toBe(errorTable[code].textLeaves);
  });

  it('keep violations and the retry hint', () => {
    const detail = {
      fieldViolations: [{ field: 'sampling.top_p', description: 'must be above 0' }],
      retryAfterMs: 1_500,
    };
    const error = errorFromStatus(asServiceError(new ClusterError('invalid_argument', 'x', { detail })));
    expect(error.detail).toEqual(detail);
  });

  it('withhold the text and the details of internal errors', () => {
    const detail = { fieldViolations: [{ field: 'secret', description: 'secret' }] };
    const status = statusFromError(new ClusterError('internal', 'secret', { detail }));
    expect(status.code).toBe(grpc.status.INTERNAL);
    expect(JSON.stringify(status)).not.toContain('secret');
    expect(statusFromError(new TypeError('x is not a function')).details).toBe(
      'internal error: see the log of the server',
    );
  });

  it('map an unknown status to internal, and other errors by their type', () => {
    const unknown = Object.assign(new Error('2 UNKNOWN'), {
      code: 2,
      details: 'what',
      metadata: new grpc.Metadata(),
    });
    expect(errorFromStatus(unknown)).toMatchObject({ code: 'internal', message: 'what' });
    expect(errorFromStatus(new DOMException('gone', 'AbortError'))).toMatchObject({ code: 'canceled' });
  });

  it('keep a status small, however large the error, and count the omitted parts', () => {
    const texts = fc.oneof(
      fc.string({ unit: 'binary', maxLength: 5_000 }),
      fc.constant('\ud800'.repeat(2_000)),
    );
    const violations = fc.array(fc.record({ field: texts, description: texts }), { maxLength: 40 });
    fc.assert(
      fc.property(texts, violations, fc.nat(2_000), (message, some, repeats) => {
        const fieldViolations = [
          ...some,
          ...Array.from({ length: repeats }, () => ({ field: 'f', description: 'd' })),
        ];
        const thrown = new ClusterError('invalid_argument', message, { detail: { fieldViolations } });
        const status = statusFromError(thrown);
        const [binary] = status.metadata.get('grpc-status-details-bin');
        const onTheWire = encodeURI(status.details).length + ((binary as Buffer).length / 3) * 4;
        expect(onTheWire).toBeLessThan(6_000);
        const kept = errorFromStatus(asServiceError(thrown)).detail.fieldViolations ?? [];
        expect(kept.length).toBeLessThanOrEqual(16);
        const isCounted = status.details.startsWith(`${fieldViolations.length} problems`);
        expect(isCounted || kept.length === fieldViolations.length).toBe(true);
      }),
      { numRuns: 200 },
    );
  });
});
