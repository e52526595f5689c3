// The CRDs against a real API server: accepted and rejected objects, defaults, columns, scale, immutability.

import { join } from 'node:path';

import { crdDirectory } from '@mimo/controller/resources/crd-generate';
import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { resourceTypes, type KubeObject, type ResourceType } from '@mimo/controller/kube/resource';
import {
  acceptedSpecs,
  acceptedTenants,
  refusedSpecs,
  refusedTenants,
  specWith,
} from '@mimo/controller/resources/resource-cases';
import { parseModelService } from '@mimo/controller/resources/resources';
import { parseTenant } from '@mimo/controller/resources/tenant';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { findTools } from '../harness/kubernetes/tools.ts';

const never = new AbortController().signal;
let plane: ControlPlane;
let client: KubeClient;
let count = 0;

beforeAll(async () => {
  plane = await startControlPlane({ tools: await findTools() });
  await plane.kubectl(['apply', '--filename', crdDirectory]);
  await plane.kubectl(['wait', '--for=condition=Established', '--timeout=60s', 'crd', '--all']);
  client = new KubeClient(loadKubeConfig(plane.kubeconfig), { namespace: 'default' });
});
afterAll(async () => {
  client.close();
  await plane.close();
});

async function create(type: ResourceType, spec: object, name = `case-${count++}`): Promise<KubeObject> {
  const { apiVersion, kind } = type;
  const object = { apiVersion, kind, metadata: { name }, spec };
  return client.create(type, object, never);
}

const { modelServices, tenants } = resourceTypes;

describe('a ModelService at the API server', () => {
  it.each(acceptedSpecs)('with %s is taken', async (_what, spec) => {
    await expect(create(modelServices, specWith(spec))).resolves.toBeDefined();
  });

  it.each(refusedSpecs)('with %s is refused, and the field is named', async (_what, spec, words) => {
    await expect(create(modelServices, specWith(spec))).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining(words),
    });
  });

  it('as in docs/getting-started is accepted', async () => {
    const manifests = join(import.meta.dirname, '../../docs/getting-started');
    await plane.kubectl(['apply', '--filename', manifests]);
    await expect(client.get(modelServices, 'mimo-7b-rl', never)).resolves.toBeDefined();
  });

  it('with a name too long for pod names is refused', async () => {
    await expect(create(modelServices, specWith({}), 'a'.repeat(41))).rejects.toThrow(
      'metadata.name must have at most 40 characters',
    );
  });

  it('gets the defaults that our own reading fills in', async () => {
    const created = await create(modelServices, specWith({}));
    expect(created.spec).toEqual(parseModelService({ ...created, spec: specWith({}) }).spec);
  });

  it('has an immutable model name: requests are queued under it', async () => {
    const { metadata } = await create(modelServices, specWith({}));
    const rename = { spec: { model: { name: 'another' } } };
    await expect(client.patch(modelServices, metadata.name, rename, {}, never)).rejects.toThrow(
      'name is immutable: requests are queued under it',
    );
    const precision = { spec: { model: { precision: 'int4' } } };
    await expect(client.patch(modelServices, metadata.name, precision, {}, never)).resolves.toBeDefined();
  });

  it('is scaled through its minimum, within its limits', async () => {
    await create(modelServices, specWith({ scaling: { max: 5 } }), 'scaled');
    await plane.kubectl(['scale', 'modelservice/scaled', '--replicas=3']);
    const scaled = await client.get(modelServices, 'scaled', never);
    expect(scaled.spec).toMatchObject({ scaling: { min: 3, max: 5 } });
    await expect(plane.kubectl(['scale', 'ms/scaled', '--replicas=6'])).rejects.toThrow(
      'min must not be more than max',
    );
  });

  it('shows its state in columns, and the reasons in wide output', async () => {
    await create(modelServices, specWith({}), 'shown');
    const status = {
      observedGeneration: 1,
      conditions: [
        {
          type: 'Ready',
          status: 'True',
          observedGeneration: 1,
          lastTransitionTime: '2026-01-01T00:00:00Z',
          reason: 'GroupsReady',
          message: '',
        },
      ],
      groups: { wanted: 4, ready: 3, updated: 2, draining: 1 },
      queue: { waitingRequests: 7 },
      lastDecision: {
        wanted: 4,
        before: 1,
        reason: 'Backlog',
        message: '1 -> 4',
        formula: '',
        clamps: [],
        inputs: { readyGroups: 1, startingGroups: 0, groupTokensPerSecond: 1, startUpSeconds: 1 },
        time: '2026-01-01T00:00:00Z',
      },
    };
    await client.patch(modelServices, 'shown', { status }, { subresource: 'status' }, never);
    const wide = await plane.kubectl(['get', 'mimo', 'shown', '--output=wide']);
    const rows = wide
      .trim()
      .split('\n')
      .map((line) => line.split(/\s{2,}/).map((cell) => cell.trim()));
    expect(rows[0]).toEqual([
      'NAME',
      'MODEL',
      'READY',
      'GROUPS',
      'WANTED',
      'WAITING',
      'REASON',
      'UPDATED',
      'DRAINING',
      'WHY',
      'AGE',
    ]);
    expect(rows[1]?.slice(0, -1)).toEqual([
      'shown',
      'mimo-7b-rl',
      'True',
      '3',
      '4',
      '7',
      'Backlog',
      '2',
      '1',
      '1 -> 4',
    ]);
  });

  it('rejects a status written with the spec, and a status of another form', async () => {
    await create(modelServices, specWith({}), 'apart');
    await client.patch(modelServices, 'apart', { status: { replicas: 9 } }, {}, never);
    expect((await client.get(modelServices, 'apart', never)).status).toBeUndefined();
    const wrong = { status: { groups: { wanted: -1, ready: 0, updated: 0, draining: 0 } } };
    await expect(
      client.patch(modelServices, 'apart', wrong, { subresource: 'status' }, never),
    ).rejects.toThrow('status.groups.wanted');
  });
});

describe('a Tenant at the API server', () => {
  it.each(acceptedTenants)('with %s is taken', async (_what, spec) => {
    await expect(create(tenants, spec)).resolves.toBeDefined();
  });

  it.each(refusedTenants)('with %s is refused, and the field is named', async (_what, spec, words) => {
    await expect(create(tenants, spec)).rejects.toThrow(words);
  });

  it('gets the defaults that our own reading fills in', async () => {
    const created = await create(tenants, { apiKeys: [{ secretName: 'a' }] });
    expect(created.spec).toEqual(parseTenant({ ...created, spec: { apiKeys: [{ secretName: 'a' }] } }).spec);
  });
});
