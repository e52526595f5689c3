// resources.ts and status.ts -> the CRDs in charts/mimo-cluster/crds. `node controller/src/resources/crd-generate.ts`
// writes them; a test compares the committed files. Owns how a zod schema becomes a structural schema; knows no API
// server.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { stringify } from 'yaml';
import { z } from 'zod';

import { modelServiceSpec, resourceGroup, resourceVersion, serviceNameMaxLength } from './resources.ts';
import { tenantSpec } from './tenant.ts';
import { modelServiceStatus, tenantStatus } from './status.ts';

/** Where the chart keeps its CRDs. */
export const crdDirectory = join(import.meta.dirname, '../../../charts/mimo-cluster/crds');

interface PrinterColumn {
  readonly name: string;
  readonly type: 'string' | 'integer' | 'date';
  readonly jsonPath: string;
  readonly description?: string;
  /** Columns with priority 1 show with `-o wide` only. */
  readonly priority?: number;
}

interface ResourceDefinition {
  readonly kind: string;
  readonly plural: string;
  readonly shortNames: readonly string[];
  readonly description: string;
  readonly spec: z.ZodType;
  readonly status: z.ZodType;
  readonly rules: readonly { readonly rule: string; readonly message: string }[];
  readonly columns: readonly PrinterColumn[];
  readonly scale?: Readonly<Record<string, string>>;
}

const age: PrinterColumn = { name: 'Age', type: 'date', jsonPath: '.metadata.creationTimestamp' };

const definitions: readonly ResourceDefinition[] = [
  {
    kind: 'ModelService',
    plural: 'modelservices',
    shortNames: ['ms', 'mimo'],
    description: 'A model served by replica groups that scale with the queue.',
    spec: modelServiceSpec,
    status: modelServiceStatus,
    rules: [
      {
        rule: `size(self.metadata.name) <= ${serviceNameMaxLength}`,
        message: `metadata.name must have at most ${serviceNameMaxLength} characters: pods are named after it`,
      },
    ],
    columns: [
      { name: 'Model', type: 'string', jsonPath: '.spec.model.name' },
      { name: 'Ready', type: 'string', jsonPath: '.status.conditions[?(@.type=="Ready")].status' },
      {
        name: 'Groups',
        type: 'integer',
        jsonPath: '.status.groups.ready',
        description: 'Groups that serve.',
      },
      { name: 'Wanted', type: 'integer', jsonPath: '.status.groups.wanted' },
      { name: 'Waiting', type: 'integer', jsonPath: '.status.queue.waitingRequests' },
      { name: 'Reason', type: 'string', jsonPath: '.status.lastDecision.reason' },
      { name: 'Updated', type: 'integer', jsonPath: '.status.groups.updated', priority: 1 },
      { name: 'Draining', type: 'integer', jsonPath: '.status.groups.draining', priority: 1 },
      { name: 'Why', type: 'string', jsonPath: '.status.lastDecision.message', priority: 1 },
      age,
    ],
    // The minimum, not the count: the autoscaler still decides above what `kubectl scale` sets.
    scale: {
      specReplicasPath: '.spec.scaling.min',
      statusReplicasPath: '.status.replicas',
      labelSelectorPath: '.status.selector',
    },
  },
  {
    kind: 'Tenant',
    plural: 'tenants',
    shortNames: ['tn'],
    description: 'Who may use the cluster, with which keys and how much.',
    spec: tenantSpec,
    status: tenantStatus,
    rules: [],
    columns: [
      { name: 'Weight', type: 'integer', jsonPath: '.spec.weight' },
      { name: 'Class', type: 'string', jsonPath: '.spec.priorityClass' },
      { name: 'Ready', type: 'string', jsonPath: '.status.conditions[?(@.type=="Ready")].status' },
      age,
    ],
  },
];

/** The CRDs as text, by file name. The same sources produce the same bytes. */
export function generateCrds(): ReadonlyMap<string, string> {
  const head =
    '# Written by controller/src/resources/crd-generate.ts from the schemas beside it; do not edit.\n';
  return new Map(
    definitions.map((definition) => [
      `${definition.plural}.yaml`,
      head + stringify(crdOf(definition), { lineWidth: 0, singleQuote: true, aliasDuplicateObjects: false }),
    ]),
  );
}

function crdOf(definition: ResourceDefinition): object {
  const { kind, plural, shortNames, description, rules, columns, scale } = definition;
  return {
    apiVersion: 'apiextensions.k8s.io/v1',
    kind: 'CustomResourceDefinition',
    metadata: { name: `${plural}.${resourceGroup}` },
    spec: {
      group: resourceGroup,
      scope: 'Namespaced',
      names: { kind, listKind: `${kind}List`, plural, singular: kind.toLowerCase(), shortNames },
      versions: [
        {
          name: resourceVersion,
          served: true,
          storage: true,
          subresources: { status: {}, ...(scale === undefined ? {} : { scale }) },
          additionalPrinterColumns: columns,
          schema: {
            openAPIV3Schema: {
              type: 'object',
              description,
              required: ['spec'],
              properties: {
                apiVersion: { type: 'string' },
                kind: { type: 'string' },
                metadata: { type: 'object' },
                spec: structuralSchema(definition.spec),
                status: structuralSchema(definition.status),
              },
              ...(rules.length === 0 ? {} : { 'x-kubernetes-validations': rules }),
            },
          },
        },
      ],
    },
  };
}

interface JsonSchema {
  readonly properties?: Readonly<Record<string, JsonSchema>>;
  readonly items?: JsonSchema;
  default?: unknown;
}

/** A schema in Kubernetes' form: optional input is not required, integers are int64. */
function structuralSchema(schema: z.ZodType): unknown {
  const structural = z.toJSONSchema(schema, {
    io: 'input',
    target: 'openapi-3.0',
    override: ({ jsonSchema }) => {
      if (jsonSchema.enum?.every(Number.isInteger) === true) {
        jsonSchema.type = 'integer';
      }
      if (jsonSchema.type === 'integer') {
        jsonSchema.format = 'int64';
        if (jsonSchema.maximum === Number.MAX_SAFE_INTEGER) {
          delete jsonSchema.maximum;
        }
      }
    },
  }) as JsonSchema;
  completeDefaults(structural);
  return structural;
}

/** The API server checks an object's default against the rules without the defaults of its fields: fill them in. */
function completeDefaults(schema: JsonSchema): void {
  const fields = Object.entries(schema.properties ?? {});
  for (const [, field] of fields) {
    completeDefaults(field);
  }
  if (schema.items !== undefined) {
    completeDefaults(schema.items);
  }
  if (schema.properties !== undefined && schema.default !== undefined) {
    const given = fields.filter(([, field]) => field.default !== undefined);
    schema.default = Object.fromEntries(given.map(([name, field]) => [name, field.default]));
  }
}

if (import.meta.main) {
  for (const [name, content] of generateCrds()) {
    writeFileSync(join(crdDirectory, name), content);
  }
}
