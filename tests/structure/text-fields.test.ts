// The fields of a ModelService that change the text of its answers: for each field the test takes the pods' settings as
// the controller writes them and the identity as a worker computes it. A new field must be added here.

import { cp, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { generateCrds } from '@mimo/controller/resources/crd-generate';
import { rankContainer, volumesOf, type WorkerSettings } from '@mimo/controller/decide/containers';
import { parseModelService, type ModelService } from '@mimo/controller/resources/resources';
import { modelHashOf, revisionOf } from '@mimo/controller/decide/revision';
import { parseWorkerConfig } from '@mimo/worker/config';
import { identityOf } from '@mimo/worker/identity';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';

const demo = join(import.meta.dirname, '../../models/mimo-demo');
const settings: WorkerSettings = {
  image: 'worker:1',
  cudaImage: 'worker:1-cuda',
  imagePullPolicy: 'IfNotPresent',
  natsUrl: 'nats://queue:4222',
  cache: { kind: 'pod' },
};

type Fields = Record<string, unknown>;

const hub = { repository: 'org/mimo', revision: 'v1' };
const claim = { volumeClaim: { claimName: 'models', path: 'mimo' } };
const toleration = { key: 'gpu', operator: 'Equal', value: 'yes', effect: 'NoExecute', tolerationSeconds: 9 };

/** What each field is changed to, from `base`, and whether another text comes of it. */
const table: Readonly<
  Record<string, { readonly changes: 'text' | 'nothing'; readonly to: Fields; readonly from?: Fields }>
> = {
  'model.name': { changes: 'nothing', to: { model: { name: 'other' } } },
  'model.source.hub.repository': source('text', { hub: { ...hub, repository: 'org/other' } }),
  'model.source.hub.revision': source('text', { hub: { ...hub, revision: 'v2' } }),
  'model.source.hub.tokenSecret.name': source('nothing', { hub: { ...hub, tokenSecret: { name: 's' } } }),
  'model.source.hub.tokenSecret.key': source('nothing', {
    hub: { ...hub, tokenSecret: { name: 's', key: 'k' } },
  }),
  'model.source.volumeClaim.claimName': source(
    'text',
    { volumeClaim: { claimName: 'others', path: 'mimo' } },
    claim,
  ),
  'model.source.volumeClaim.path': source(
    'text',
    { volumeClaim: { claimName: 'models', path: 'other' } },
    claim,
  ),
  'model.source.hostPath': source('text', { hostPath: '/models/other' }, { hostPath: '/models/mimo' }),
  'model.precision': { changes: 'text', to: { model: { precision: 'fp32' } } },
  tensorParallel: { changes: 'nothing', to: { tensorParallel: 2 } },
  'speculation.draftTokens': { changes: 'nothing', to: { speculation: { draftTokens: 0 } } },
  'speculation.adaptive': { changes: 'nothing', to: { speculation: { adaptive: false } } },
  engine: { changes: 'nothing', to: { engine: 'onnxruntime' } },
  'resources.cpu': { changes: 'nothing', to: { resources: { cpu: '9' } } },
  'resources.memory': { changes: 'nothing', to: { resources: { memory: '99Gi' } } },
  'resources.accelerators': {
    changes: 'nothing',
    from: { model: { precision: 'fp16' } },
    to: { model: { precision: 'fp16' }, resources: { accelerators: 1 } },
  },
  'resources.acceleratorResource': {
    changes: 'nothing',
    to: { resources: { acceleratorResource: 'a.b/gpu' } },
  },
  'resources.executionProvider': { changes: 'nothing', to: { resources: { executionProvider: 'cpu' } } },
  'resources.kvCache': { changes: 'nothing', to: { resources: { kvCache: '1Gi' } } },
  placement: { changes: 'nothing', to: { placement: 'spread' } },
  ...unchanged('scaling', {
    min: 1,
    max: 9,
    targetWaitSeconds: 9,
    groupTokensPerSecond: 9,
    startUpSeconds: 9,
    memorySeconds: 90,
    scaleToZeroAfterSeconds: 9,
  }),
  ...unchanged('rollout', { maxSurge: 9, maxUnavailable: 9 }),
  drainSeconds: { changes: 'nothing', to: { drainSeconds: 9 } },
  ...unchanged('template', {
    image: 'worker:2',
    imagePullPolicy: 'Always',
    imagePullSecrets: [{ name: 's' }],
    labels: { a: 'b' },
    annotations: { a: 'b' },
    nodeSelector: { a: 'b' },
    tolerations: [toleration],
    priorityClassName: 'high',
    runtimeClassName: 'nvidia',
    serviceAccountName: 'worker',
    cacheVolumeClaim: 'cache',
  }),
  'template.env': {
    changes: 'text',
    to: { template: { env: [{ name: 'MIMO_WORKER_PRECISION', value: 'fp32' }] } },
  },
};

function source(changes: 'text' | 'nothing', to: Fields, from: Fields = { hub }): (typeof table)[string] {
  return { changes, from: { model: { source: from } }, to: { model: { source: to } } };
}

function unchanged(part: string, fields: Fields): typeof table {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [
      `${part}.${name}`,
      { changes: 'nothing', to: { [part]: { [name]: value } } } as const,
    ]),
  );
}

function serviceOf(fields: Fields): ModelService {
  const { model = {}, ...others } = fields as { readonly model?: Fields };
  return parseModelService({
    metadata: { name: 'chat', namespace: 'models', uid: 'u' },
    spec: { model: { name: 'mimo', source: { hub }, ...model }, ...others },
  });
}

interface JsonSchema {
  readonly properties?: Readonly<Record<string, JsonSchema>>;
}

function leavesOf({ properties }: JsonSchema, path = ''): string[] {
  return properties === undefined
    ? [path]
    : Object.entries(properties).flatMap(([name, field]) =>
        leavesOf(field, path === '' ? name : `${path}.${name}`),
      );
}

/** The settings of a group's first rank. */
function configOf(service: ModelService): ReturnType<typeof parseWorkerConfig> {
  const group = { group: 'g', revision: 'r', index: 0, groupToken: 't' };
  const { env } = rankContainer(service, group, { settings, rank: 0 });
  const variables = env as readonly { readonly name: string; readonly value?: string }[];
  return parseWorkerConfig(Object.fromEntries(variables.map(({ name, value = '' }) => [name, value])));
}

/** What names the content that a pod finds: where it is mounted from, and its path there. */
function contentOf(service: ModelService): string {
  const mounted = volumesOf(service.spec, settings).find(({ name }) => name === 'checkpoint');
  return JSON.stringify([mounted, configOf(service).checkpointDirectory]);
}

describe('a field of a ModelService', () => {
  let directory: string;

  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-fields-'));
    await cp(demo, join(directory, 'other'), { recursive: true });
    await writeFile(join(directory, 'other/chat_template.jinja'), 'another template');
  });
  afterAll(() => rm(directory, { recursive: true, force: true }));

  /** The identity of a group of the service; content that `named` does not name is other content. */
  function identityFor(service: ModelService, named: ModelService): Promise<string> {
    const config = configOf(service);
    const checkpointDirectory = contentOf(service) === contentOf(named) ? demo : join(directory, 'other');
    return identityOf({ ...config, checkpointDirectory }, new AbortController().signal);
  }

  it('is in the table', () => {
    const crd = parse(generateCrds().get('modelservices.yaml') ?? '') as {
      readonly spec: {
        readonly versions: readonly { readonly schema: { readonly openAPIV3Schema: JsonSchema } }[];
      };
    };
    const spec = crd.spec.versions[0]?.schema.openAPIV3Schema.properties?.['spec'];
    expect(Object.keys(table).toSorted()).toEqual(leavesOf(spec ?? {}).toSorted());
  });

  it.each(Object.entries(table))('%s', async (_path, { changes, from = {}, to }) => {
    const [before, after] = [serviceOf(from), serviceOf(to)];
    const [identity, other] = [await identityFor(before, before), await identityFor(after, before)];
    expect(other === identity ? 'nothing' : 'text').toBe(changes);
    // What changes the text replaces the groups, and is published anew before there are others.
    const hashes = [before, after].map(({ spec }) => [revisionOf(spec, settings), modelHashOf(spec)]);
    expect(changes === 'nothing' || hashes[0]?.every((hash, index) => hash !== hashes[1]?.[index])).toBe(
      true,
    );
  });
});
