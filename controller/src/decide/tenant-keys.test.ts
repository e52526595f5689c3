import { describe, expect, it } from 'vitest';

import { parseTenant, type Tenant } from '../resources/tenant.ts';
import { planTenantKeys, type SecretEntries } from './tenant-keys.ts';

function tenantOf(name: string, spec: object, metadata: object = {}): Tenant {
  return parseTenant({
    metadata: { name, namespace: 'models', uid: name, ...metadata },
    spec: { apiKeys: [{ secretName: name }], ...spec },
  });
}

const [keyA, keyB] = ['a'.repeat(64), 'b'.repeat(64)];
const secrets = new Map<string, SecretEntries>([
  ['team-a', { apiKey: `${keyA}\n` }],
  ['team-b', { apiKey: keyB.toUpperCase() }],
  ['broken', { apiKey: 'sk-not-a-hash' }],
]);

function fileOf(tenants: readonly Tenant[]): unknown {
  return JSON.parse(planTenantKeys(tenants, secrets).keysFile);
}

describe('planTenantKeys', () => {
  it('writes the file that gateways read, the same for the same tenants', () => {
    const tenants = [tenantOf('team-b', { allowedModels: ['z', 'a'] }), tenantOf('team-a', {})];
    expect(fileOf(tenants)).toEqual({
      keys: [
        { sha256: keyA, tenant: 'team-a' },
        { sha256: keyB, tenant: 'team-b', models: ['a', 'z'] },
      ],
    });
    const plan = planTenantKeys(tenants, secrets);
    expect(planTenantKeys(tenants.toReversed(), secrets).keysFile).toBe(plan.keysFile);
    expect(plan.ready.get('team-a')).toEqual({
      status: 'True',
      reason: 'KeysRendered',
      message: '1 usable',
    });
  });

  it("reports a missing key without quoting any key, and keeps the tenant's other keys", () => {
    const apiKeys = [
      { secretName: 'team-a' },
      { secretName: 'nowhere' },
      { secretName: 'team-b', key: 'other' },
      { secretName: 'broken' },
    ];
    const plan = planTenantKeys([tenantOf('team-a', { apiKeys })], secrets);
    expect(JSON.parse(plan.keysFile)).toEqual({ keys: [{ sha256: keyA, tenant: 'team-a' }] });
    const { status, message } = plan.ready.get('team-a') ?? {};
    expect(status).toBe('False');
    expect(message).toContain('Secret nowhere does not exist');
    expect(message).toContain('Secret team-b has no entry other');
    expect(message).toContain('Secret broken: entry apiKey is not a SHA-256 in hex');
    expect(message).not.toContain('sk-not-a-hash');
  });

  it('assigns a key that two tenants claim to neither', () => {
    const shared = tenantOf('other', { apiKeys: [{ secretName: 'team-a' }] });
    const plan = planTenantKeys([tenantOf('team-a', {}), shared], secrets);
    expect(JSON.parse(plan.keysFile)).toEqual({ keys: [] });
    expect(plan.ready.get('other')?.message).toContain('tenant team-a has the same key');
    expect(plan.ready.get('team-a')?.status).toBe('False');
  });

  it('leaves out a tenant under deletion, and writes a file even without tenants', () => {
    const deleted = tenantOf('team-a', {}, { deletionTimestamp: '2026-01-01T00:00:00Z' });
    expect(fileOf([deleted])).toEqual({ keys: [] });
    expect(fileOf([])).toEqual({ keys: [] });
  });
});
