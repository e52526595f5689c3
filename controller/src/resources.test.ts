import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';

import { crdDirectory, generateCrds } from './crd-generate.ts';
import type { WorkerSettings } from './decide/containers.ts';
import { parseModelService, parseTenant } from './resources.ts';
import { revisionOf } from './revision.ts';

const source = { hub: { repository: 'XiaomiMiMo/MiMo-7B-RL' } };
const model = { name: 'mimo-7b-rl', source };
const metadata = { name: 'chat', namespace: 'models', uid: 'u1' };

function serviceWith(spec: object, named: object = {}): unknown {
  return { metadata: { ...metadata, ...named }, spec: { model, ...spec } };
}

describe('parseModelService', () => {
  it('fills in every default', () => {
    const { spec } = parseModelService(serviceWith({}));
    expect(spec).toMatchObject({
      model: { precision: 'int8', source: { hub: { revision: 'main' } } },
      tensorParallel: 1,
      speculation: { draftTokens: 1, adaptive: true },
      placement: 'pod',
      scaling: { min: 0, max: 1, targetWaitSeconds: 30, scaleToZeroAfterSeconds: 300 },
      rollout: { maxSurge: 1, maxUnavailable: 0 },
      drainSeconds: 120,
      resources: { accelerators: 0, acceleratorResource: 'nvidia.com/gpu' },
      template: { env: [], labels: {} },
    });
  });

  const accepted: readonly (readonly [string, object])[] = [
    ['a checkpoint on a claim', { model: { ...model, source: { volumeClaim: { claimName: 'weights' } } } }],
    ['a checkpoint on the host', { model: { ...model, source: { hostPath: '/models/mimo' } } }],
    ['int4', { model: { ...model, precision: 'int4' } }],
    ['eight ranks', { tensorParallel: 8, placement: 'spread' }],
    ['no drafts', { speculation: { draftTokens: 0 } }],
    ['a fixed count', { scaling: { min: 3, max: 3 } }],
    ['no surge', { rollout: { maxSurge: 0, maxUnavailable: 1 } }],
    [
      'another device',
      {
        model: { ...model, precision: 'fp16' },
        resources: { accelerators: 1, acceleratorResource: 'example.com/gpu' },
      },
    ],
    ['accelerators beside ranks on the CPU', { resources: { accelerators: 1, executionProvider: 'cpu' } }],
    ['memory for keys and values', { resources: { kvCache: '2Gi' } }],
    [
      'device memory beyond that of the host',
      { model: { ...model, precision: 'bf16' }, resources: { accelerators: 1, kvCache: '40Gi' } },
    ],
    ['milli CPUs', { resources: { cpu: '500m', memory: '1.5Gi' } }],
    ['an immediate drain', { drainSeconds: 0 }],
    [
      'a toleration',
      { template: { tolerations: [{ key: 'gpu', operator: 'Exists', effect: 'NoSchedule' }] } },
    ],
    ['variables', { template: { env: [{ name: 'MIMO_WORKER_THREADS', value: '8' }] } }],
  ];
  it.each(accepted)('takes %s', (_name, spec) => {
    expect(() => parseModelService(serviceWith(spec))).not.toThrow();
  });

  const refused: readonly (readonly [string, object, string])[] = [
    ['no source', { model: { ...model, source: {} } }, 'spec.model.source'],
    ['two sources', { model: { ...model, source: { ...source, hostPath: '/x' } } }, 'exactly one of'],
    [
      'a relative host path',
      { model: { ...model, source: { hostPath: 'x' } } },
      'spec.model.source.hostPath',
    ],
    [
      'a hub id without owner',
      { model: { ...model, source: { hub: { repository: 'MiMo' } } } },
      'repository',
    ],
    [
      'a claim name in capitals',
      { model: { ...model, source: { volumeClaim: { claimName: 'A' } } } },
      'claimName',
    ],
    ['a nameless model', { model: { ...model, name: '' } }, 'spec.model.name'],
    ['a model name with spaces', { model: { ...model, name: 'a b' } }, 'spec.model.name'],
    ['a precision nobody has', { model: { ...model, precision: 'fp8' } }, 'spec.model.precision'],
    ['three ranks', { tensorParallel: 3 }, 'spec.tensorParallel'],
    ['sixteen ranks', { tensorParallel: 16 }, 'spec.tensorParallel'],
    ['a textual rank count', { tensorParallel: '2' }, 'spec.tensorParallel'],
    ['negative drafts', { speculation: { draftTokens: -1 } }, 'spec.speculation.draftTokens'],
    ['many drafts', { speculation: { draftTokens: 9 } }, 'spec.speculation.draftTokens'],
    ['another engine', { engine: 'llama.cpp' }, 'spec.engine'],
    ['another placement', { placement: 'node' }, 'spec.placement'],
    ['min above max', { scaling: { min: 3, max: 2 } }, 'min must not be more than max'],
    ['no groups at most', { scaling: { max: 0 } }, 'spec.scaling.max'],
    ['a negative floor', { scaling: { min: -1 } }, 'spec.scaling.min'],
    ['half a group', { scaling: { max: 1.5 } }, 'spec.scaling.max'],
    ['no target', { scaling: { targetWaitSeconds: 0 } }, 'spec.scaling.targetWaitSeconds'],
    ['a textual target', { scaling: { targetWaitSeconds: '10s' } }, 'spec.scaling.targetWaitSeconds'],
    ['no speed', { scaling: { groupTokensPerSecond: 0 } }, 'spec.scaling.groupTokensPerSecond'],
    ['a short memory', { scaling: { memorySeconds: 5 } }, 'spec.scaling.memorySeconds'],
    ['a rollout that cannot move', { rollout: { maxSurge: 0, maxUnavailable: 0 } }, 'must not both be 0'],
    ['a negative surge', { rollout: { maxSurge: -1 } }, 'spec.rollout.maxSurge'],
    ['a percentage', { rollout: { maxSurge: '25%' } }, 'spec.rollout.maxSurge'],
    ['memory in words', { resources: { memory: 'lots' } }, 'spec.resources.memory'],
    ['negative accelerators', { resources: { accelerators: -1 } }, 'spec.resources.accelerators'],
    [
      'accelerators at a precision that they do not compute',
      { resources: { accelerators: 1 } },
      'fp16 or bf16',
    ],
    ['cuda without accelerators', { resources: { executionProvider: 'cuda' } }, 'needs accelerators'],
    ['more keys and values than memory', { resources: { kvCache: '32Gi' } }, 'kvCache must be less'],
    ['a device without domain', { resources: { acceleratorResource: 'gpu' } }, 'acceleratorResource'],
    ['a drain of a week', { drainSeconds: 604_800 }, 'spec.drainSeconds'],
    ['a variable in small letters', { template: { env: [{ name: 'threads' }] } }, 'spec.template.env.0.name'],
    ['an unknown toleration', { template: { tolerations: [{ effect: 'Never' }] } }, 'tolerations.0.effect'],
  ];
  it.each(refused)('refuses %s and names the field', (_name, spec, words) => {
    expect(() => parseModelService(serviceWith(spec))).toThrow(words);
  });

  it('refuses a name that pods could not be named after', () => {
    expect(() => parseModelService(serviceWith({}, { name: 'a'.repeat(41) }))).toThrow('metadata.name');
  });

  it('lists every problem in one error', () => {
    const spec = { tensorParallel: 3, scaling: { min: 9, max: 2 }, drainSeconds: -1 };
    expect(() => parseModelService(serviceWith(spec))).toThrow(/tensorParallel.*drainSeconds/);
  });
});

describe('parseTenant', () => {
  it('fills in defaults and refuses a tenant without keys', () => {
    const tenant = { metadata, spec: { apiKeys: [{ secretName: 'team-a' }] } };
    expect(parseTenant(tenant).spec).toMatchObject({
      weight: 100,
      priorityClass: 'standard',
      allowedModels: [],
    });
    expect(() => parseTenant({ metadata, spec: { apiKeys: [] } })).toThrow('spec.apiKeys');
    expect(() => parseTenant({ metadata, spec: { ...tenant.spec, weight: 0 } })).toThrow('spec.weight');
    expect(() => parseTenant({ metadata, spec: { ...tenant.spec, priorityClass: 'vip' } })).toThrow(
      'priorityClass',
    );
  });
});

describe('revisionOf', () => {
  const worker: WorkerSettings = {
    image: 'worker:1',
    cudaImage: 'worker:1-cuda',
    imagePullPolicy: 'IfNotPresent',
    natsUrl: 'nats://queue:4222',
    cache: { kind: 'pod' },
  };
  const spec = parseModelService(serviceWith({})).spec;

  it('changes with what shapes the pods', () => {
    expect(revisionOf(spec, worker)).toMatch(/^[0-9a-f]{8}$/);
    expect(revisionOf({ ...spec, tensorParallel: 2 }, worker)).not.toBe(revisionOf(spec, worker));
    expect(revisionOf({ ...spec, template: { ...spec.template, image: 'worker:2' } }, worker)).not.toBe(
      revisionOf(spec, worker),
    );
    expect(revisionOf(spec, { ...worker, image: 'worker:2' })).not.toBe(revisionOf(spec, worker));
    const given = { ...spec, template: { ...spec.template, image: 'mine:1' } };
    expect(revisionOf(given, { ...worker, image: 'worker:2' })).toBe(revisionOf(given, worker));
  });

  it('does not change with how many there are, nor with the order of fields', () => {
    const scaled = { ...spec, scaling: { ...spec.scaling, max: 9 }, drainSeconds: 5 };
    expect(revisionOf(scaled, worker)).toBe(revisionOf(spec, worker));
    const reordered = Object.fromEntries(Object.entries(spec).toReversed()) as typeof spec;
    expect(revisionOf(reordered, worker)).toBe(revisionOf(spec, worker));
  });
});

describe('generateCrds', () => {
  it('gives what is committed, and nothing else is', () => {
    const generated = generateCrds();
    expect(readdirSync(crdDirectory).toSorted()).toEqual([...generated.keys()].toSorted());
    for (const [name, content] of generated) {
      expect(readFileSync(join(crdDirectory, name), 'utf8')).toBe(content);
    }
  });

  it.each([...generateCrds()])('%s is structural', (_name, content) => {
    const { spec } = parse(content) as { spec: { versions: { schema: { openAPIV3Schema: Schema } }[] } };
    const problems = problemsOf(spec.versions[0]?.schema.openAPIV3Schema ?? {}, '');
    expect(problems).toEqual([]);
  });
});

interface Schema {
  readonly type?: string;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly items?: Schema;
  readonly additionalProperties?: Schema | boolean;
  readonly [keyword: string]: unknown;
}

/** What the API server would refuse: untyped fields, references, closed objects, alternatives. */
function problemsOf(schema: Schema, path: string): string[] {
  const forbidden = [
    '$ref',
    '$schema',
    'oneOf',
    'anyOf',
    'allOf',
    'const',
    'not',
    'nullable',
    'exclusiveMinimum',
  ];
  return [
    ...(schema.type === undefined ? [`${path} has no type`] : []),
    ...forbidden.filter((keyword) => keyword in schema).map((keyword) => `${path} has ${keyword}`),
    ...(schema.additionalProperties === false ? [`${path} is closed`] : []),
    ...Object.entries(schema.properties ?? {}).flatMap(([name, field]) =>
      problemsOf(field, `${path}.${name}`),
    ),
    ...(schema.items === undefined ? [] : problemsOf(schema.items, `${path}[]`)),
    ...(typeof schema.additionalProperties === 'object'
      ? problemsOf(schema.additionalProperties, `${path}.*`)
      : []),
  ];
}
