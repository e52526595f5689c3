import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';

import { crdDirectory, generateCrds } from './crd-generate.ts';
import type { WorkerSettings } from '../decide/containers.ts';
import { acceptedSpecs, acceptedTenants, refusedSpecs, refusedTenants, specWith } from './resource-cases.ts';
import { parseModelService } from './resources.ts';
import { parseTenant } from './tenant.ts';
import { revisionOf } from '../decide/revision.ts';

const metadata = { name: 'chat', namespace: 'models', uid: 'u1' };

function serviceWith(spec: object, named: object = {}): unknown {
  return { metadata: { ...metadata, ...named }, spec: specWith(spec) };
}

/** Our errors write a path with dots alone. */
function ourWords(words: string): string {
  return words.replaceAll(/\[(\d+)\]/g, '.$1');
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

  it.each(acceptedSpecs)('accepts %s', (_name, spec) => {
    expect(() => parseModelService(serviceWith(spec))).not.toThrow();
  });

  it.each(refusedSpecs)('refuses %s and names the field', (_name, spec, words) => {
    expect(() => parseModelService(serviceWith(spec))).toThrow(ourWords(words));
  });

  it('refuses a name too long for the names of its pods', () => {
    expect(() => parseModelService(serviceWith({}, { name: 'a'.repeat(41) }))).toThrow('metadata.name');
  });

  it('lists every problem in one error', () => {
    const spec = { tensorParallel: 3, scaling: { min: 9, max: 2 }, drainSeconds: -1 };
    expect(() => parseModelService(serviceWith(spec))).toThrow(/tensorParallel.*drainSeconds/);
  });
});

describe('parseTenant', () => {
  it('fills in defaults', () => {
    const tenant = { metadata, spec: { apiKeys: [{ secretName: 'team-a' }] } };
    expect(parseTenant(tenant).spec).toMatchObject({
      apiKeys: [{ secretName: 'team-a', key: 'apiKey' }],
      weight: 100,
      priorityClass: 'standard',
      allowedModels: [],
    });
  });

  it.each(acceptedTenants)('accepts %s', (_name, spec) => {
    expect(() => parseTenant({ metadata, spec })).not.toThrow();
  });

  it.each(refusedTenants)('refuses %s and names the field', (_name, spec, words) => {
    expect(() => parseTenant({ metadata, spec })).toThrow(ourWords(words));
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

  it('changes with every field that shapes the pods', () => {
    expect(revisionOf(spec, worker)).toMatch(/^[0-9a-f]{8}$/);
    expect(revisionOf({ ...spec, tensorParallel: 2 }, worker)).not.toBe(revisionOf(spec, worker));
    expect(revisionOf({ ...spec, template: { ...spec.template, image: 'worker:2' } }, worker)).not.toBe(
      revisionOf(spec, worker),
    );
    expect(revisionOf(spec, { ...worker, image: 'worker:2' })).not.toBe(revisionOf(spec, worker));
    const given = { ...spec, template: { ...spec.template, image: 'mine:1' } };
    expect(revisionOf(given, { ...worker, image: 'worker:2' })).toBe(revisionOf(given, worker));
  });

  it('does not change with the number of pods or the order of fields', () => {
    const scaled = { ...spec, scaling: { ...spec.scaling, max: 9 }, drainSeconds: 5 };
    expect(revisionOf(scaled, worker)).toBe(revisionOf(spec, worker));
    const reordered = Object.fromEntries(Object.entries(spec).toReversed()) as typeof spec;
    expect(revisionOf(reordered, worker)).toBe(revisionOf(spec, worker));
  });
});

describe('generateCrds', () => {
  it('returns exactly the committed files', () => {
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
