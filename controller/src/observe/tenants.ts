// The Tenants of the namespace -> the Secret that gateways read their API keys from, and a condition on each Tenant.
// Owns when Secrets are read: they cannot be watched with the permission to get one by name, so they are polled. The
// file's content is decided in decide/tenant-keys.ts.

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { planTenantKeys, type SecretEntries } from '../decide/tenant-keys.ts';
import { hasReason } from '../kube/api-status.ts';
import type { KubeClient } from '../kube/client.ts';
import type { Informer } from '../kube/informer.ts';
import { resourceTypes, type KubeObject } from '../kube/resource.ts';
import type { TenantRecord } from './records.ts';
import type { Condition } from '../resources/status.ts';

export interface TenantKeysOptions {
  readonly client: KubeClient;
  readonly tenants: Informer<TenantRecord>;
  /** The Secret that is written; its entry is keys.json. */
  readonly secretName: string;
  readonly log: Log;
}

const entry = 'keys.json';
/** A new Secret is found soon, a changed one after a while. */
const missingRoundMs = 5_000;
const roundMs = 30_000;
const retryMs = 2_000;

/** Keeps the keys file and the conditions up to date until the signal fires. Never rejects. */
export async function keepTenantKeys(options: TenantKeysOptions, signal: AbortSignal): Promise<void> {
  let wake = new AbortController();
  const stop = options.tenants.onChange(() => wake.abort());
  try {
    while (!signal.aborted) {
      wake = new AbortController();
      let waitMs = retryMs;
      try {
        waitMs = (await writeTenantKeys(options, signal)) ? roundMs : missingRoundMs;
      } catch (error) {
        if (!signal.aborted) {
          options.log.warn({ error: ClusterError.from(error) }, 'cannot write the tenant keys');
        }
      }
      await pause(waitMs, AbortSignal.any([signal, wake.signal]));
    }
  } finally {
    stop();
  }
}

/** One round; true if every tenant is ready. */
async function writeTenantKeys(options: TenantKeysOptions, signal: AbortSignal): Promise<boolean> {
  const records = [...options.tenants.list()];
  const tenants = records.flatMap(({ tenant }) => tenant ?? []);
  const names = new Set(tenants.flatMap(({ spec }) => spec.apiKeys.map(({ secretName }) => secretName)));
  const secrets = new Map<string, SecretEntries>();
  for (const name of names) {
    secrets.set(name, await readSecret(options.client, name, signal));
  }
  const { keysFile, ready } = planTenantKeys(tenants, secrets);
  const current = await readSecret(options.client, options.secretName, signal);
  if (current?.[entry] !== keysFile) {
    const data = { [entry]: Buffer.from(keysFile).toString('base64') };
    const secret = { apiVersion: 'v1', kind: 'Secret', metadata: { name: options.secretName }, data };
    await options.client.apply(resourceTypes.secrets, secret, {}, signal);
    options.log.info({ tenants: tenants.length }, 'wrote the tenant keys');
  }
  for (const record of records) {
    const judged = ready.get(record.metadata.name) ?? {
      status: 'False' as const,
      reason: 'InvalidSpec',
      message: record.problem.slice(0, 1024),
    };
    await writeCondition(options.client, record, judged, signal);
  }
  return [...ready.values()].every(({ status }) => status === 'True');
}

async function readSecret(client: KubeClient, name: string, signal: AbortSignal): Promise<SecretEntries> {
  try {
    const secret: KubeObject & { readonly data?: Readonly<Record<string, string>> } = await client.get(
      resourceTypes.secrets,
      name,
      signal,
    );
    return Object.fromEntries(
      Object.entries(secret.data ?? {}).map(([key, value]) => [key, Buffer.from(value, 'base64').toString()]),
    );
  } catch (error) {
    if (hasReason(error, 'NotFound')) {
      return undefined;
    }
    throw error;
  }
}

async function writeCondition(
  client: KubeClient,
  { metadata, status }: TenantRecord,
  judged: Pick<Condition, 'status' | 'reason' | 'message'>,
  signal: AbortSignal,
): Promise<void> {
  if (metadata.deletionTimestamp !== undefined) {
    return;
  }
  const generation = metadata.generation ?? 0;
  const before = status.conditions?.find(({ type }) => type === 'Ready');
  const same =
    before?.status === judged.status && before.reason === judged.reason && before.message === judged.message;
  if (same && before.observedGeneration === generation) {
    return;
  }
  const condition: Condition = {
    type: 'Ready',
    ...judged,
    observedGeneration: generation,
    lastTransitionTime: before?.status === judged.status ? before.lastTransitionTime : client.clock.now(),
  };
  const patch = { status: { observedGeneration: generation, conditions: [condition] } };
  try {
    await client.patch(resourceTypes.tenants, metadata.name, patch, { subresource: 'status' }, signal);
  } catch (error) {
    if (!hasReason(error, 'NotFound')) {
      throw error;
    }
  }
}
