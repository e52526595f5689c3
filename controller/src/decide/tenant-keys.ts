// Tenants and the Secrets that they name -> the gateways' keys file (gateway/src/admission/auth.ts reads it) and a
// condition for each tenant. Pure. A missing or malformed key does not affect the tenant's other keys. A key that two
// tenants claim belongs to neither, because its requests could not be attributed.

import type { Tenant } from '../resources/tenant.ts';
import type { Condition } from '../resources/status.ts';

/** The entries of a Secret, decoded; undefined: the Secret does not exist. */
export type SecretEntries = Readonly<Record<string, string>> | undefined;

export interface TenantKeysPlan {
  /** The content of keys.json: the same tenants and Secrets always give the same text. */
  readonly keysFile: string;
  /** Whether each tenant is ready, by name. */
  readonly ready: ReadonlyMap<string, Pick<Condition, 'status' | 'reason' | 'message'>>;
}

interface Found {
  readonly keys: readonly string[];
  readonly problems: readonly string[];
}

/** Plans the keys file. Tenants that are being deleted are left out. */
export function planTenantKeys(
  tenants: readonly Tenant[],
  secrets: ReadonlyMap<string, SecretEntries>,
): TenantKeysPlan {
  const living = tenants
    .filter(({ metadata }) => metadata.deletionTimestamp === undefined)
    .toSorted((a, b) => (a.metadata.name < b.metadata.name ? -1 : 1));
  const found = new Map(living.map((tenant) => [tenant.metadata.name, findKeys(tenant, secrets)]));
  const owners = new Map<string, string[]>();
  for (const [name, { keys }] of found) {
    for (const key of keys) {
      owners.set(key, [...(owners.get(key) ?? []), name]);
    }
  }
  const entries = living.flatMap(({ metadata, spec }) =>
    (found.get(metadata.name)?.keys ?? [])
      .filter((key) => owners.get(key)?.length === 1)
      .map((sha256) => ({
        sha256,
        tenant: metadata.name,
        ...(spec.allowedModels.length === 0 ? {} : { models: [...spec.allowedModels].toSorted() }),
      })),
  );
  const ready = new Map(
    [...found].map(([name, { keys, problems }]) => {
      const shared = keys.flatMap((key) => (owners.get(key) ?? []).filter((owner) => owner !== name));
      const all = [...problems, ...[...new Set(shared)].map((owner) => `tenant ${owner} has the same key`)];
      const usable = keys.filter((key) => owners.get(key)?.length === 1).length;
      return [name, judge(usable, all)];
    }),
  );
  return { keysFile: `${JSON.stringify({ keys: entries }, undefined, 2)}\n`, ready };
}

function findKeys({ spec }: Tenant, secrets: ReadonlyMap<string, SecretEntries>): Found {
  const keys = new Set<string>();
  const problems: string[] = [];
  for (const { secretName, key } of spec.apiKeys) {
    const secret = secrets.get(secretName);
    const text = secret?.[key]?.trim().toLowerCase();
    if (secret === undefined) {
      problems.push(`Secret ${secretName} does not exist`);
    } else if (text === undefined) {
      problems.push(`Secret ${secretName} has no entry ${key}`);
    } else if (/^[0-9a-f]{64}$/.test(text)) {
      keys.add(text);
    } else {
      // Not the text itself: it may be the key.
      problems.push(`Secret ${secretName}: entry ${key} is not a SHA-256 in hex`);
    }
  }
  return { keys: [...keys].toSorted(), problems };
}

function judge(
  usable: number,
  problems: readonly string[],
): Pick<Condition, 'status' | 'reason' | 'message'> {
  if (problems.length > 0) {
    return { status: 'False', reason: 'KeysMissing', message: `${problems.join('; ')} (${usable} usable)` };
  }
  return { status: 'True', reason: 'KeysRendered', message: `${usable} usable` };
}
