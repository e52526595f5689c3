// Identifies the caller. Owns the format of the API keys file and the check of a key. Independent of the transport:
// its input is the `authorization` value. Keys are kept and compared as SHA-256 only, so that neither memory nor
// timing reveals one.

import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';

import { z } from 'zod';

import { ClusterError } from '@mimo/core/process/errors';

/** The tenant behind a call. `models` undefined: every model. */
export interface Caller {
  readonly tenant: string;
  readonly models: ReadonlySet<string> | undefined;
}

/** Finds the caller from the `authorization` value; fails with `unauthenticated`. */
export type Authenticate = (authorization: string | undefined) => Caller;

const keysFileSchema = z.strictObject({
  keys: z.array(
    z
      .strictObject({
        /** Hex; written by `printf %s KEY | sha256sum`. */
        sha256: z
          .string()
          .regex(/^[0-9a-f]{64}$/)
          .optional(),
        key: z.string().min(8).optional(),
        tenant: z.string().min(1),
        models: z.array(z.string().min(1)).optional(),
      })
      .refine(
        (entry) => (entry.sha256 === undefined) !== (entry.key === undefined),
        'needs either sha256 or key',
      ),
  ),
});

/** The expected form of each field, for errors; every field that zod can name is one of these. */
const keyFields = {
  sha256: '64 hex digits',
  key: 'a text of at least 8 characters',
  tenant: 'a text that is not empty',
  models: 'a list of names',
  keys: '{ keys: [{ sha256 or key, tenant, models? }] } with no other fields',
} as const;

/** Accepts every caller as tenant `anonymous`. */
export const authenticateNobody: Authenticate = () => ({ tenant: 'anonymous', models: undefined });

/**
 * Reads `{ keys: [{ sha256 | key, tenant, models? }] }`. Fails with `invalid_argument` if the file has another form.
 */
export async function loadKeys(path: string): Promise<Authenticate> {
  let json: unknown;
  try {
    json = JSON.parse(await readFile(path, 'utf8'));
  } catch (error) {
    // Not the parser's own text: it may quote a key.
    throw new ClusterError('invalid_argument', `the keys file ${path} is not readable JSON`, {
      cause: error,
    });
  }
  return parseKeys(json, path);
}

/** The same from parsed JSON; `source` names it in errors. */
export function parseKeys(json: unknown, source: string): Authenticate {
  const parsed = keysFileSchema.safeParse(json);
  if (!parsed.success) {
    throw new ClusterError('invalid_argument', `the keys file ${source}: ${problemOf(parsed.error)}`);
  }
  const callers = new Map<string, Caller>();
  for (const { sha256, key, tenant, models } of parsed.data.keys) {
    callers.set(sha256 ?? hashOf(key ?? ''), {
      tenant,
      models: models === undefined ? undefined : new Set(models),
    });
  }
  return (authorization) => {
    const [, key] = /^Bearer +(\S+)$/i.exec(authorization ?? '') ?? [];
    if (key === undefined) {
      throw new ClusterError('unauthenticated', 'authorization must be: Bearer <API key>');
    }
    const caller = callers.get(hashOf(key));
    if (caller === undefined) {
      throw new ClusterError('unauthenticated', 'unknown API key');
    }
    return caller;
  };
}

/** The file's problem in our own words: zod's messages quote unknown fields, and a field may be a misplaced key. */
function problemOf({ issues }: z.ZodError): string {
  const place = issues[0]?.path
    .map((part) => (typeof part === 'number' ? `[${part}]` : part.toString()))
    .join('.');
  const more = issues.length > 1 ? `, and ${issues.length - 1} more problems` : '';
  return `${place || 'the top level'} must be ${expectedOf(place ?? '')}${more}`;
}

function expectedOf(place: string): string {
  const field = place.slice(place.lastIndexOf('.') + 1);
  return Object.hasOwn(keyFields, field) ? keyFields[field as keyof typeof keyFields] : keyFields.keys;
}

function hashOf(key: string): string {
  return createHash('sha256').update(key).digest('hex');
}
