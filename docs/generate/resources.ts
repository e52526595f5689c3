// The fields of ModelService and Tenant, from the CRDs that an API server gets.

import { parse } from 'yaml';

import { generateCrds } from '@mimo/controller/resources/crd-generate';

import { code, pageOf, tableOf } from './markdown.ts';

interface Schema {
  readonly type?: string;
  readonly description?: string;
  readonly default?: unknown;
  readonly enum?: readonly string[];
  readonly minimum?: number;
  readonly maximum?: number;
  readonly maxLength?: number;
  readonly maxItems?: number;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly items?: Schema;
  readonly required?: readonly string[];
  readonly 'x-kubernetes-validations'?: readonly { readonly message: string }[];
}

interface Definition {
  readonly spec: {
    readonly names: { readonly kind: string };
    readonly versions: readonly {
      readonly schema: { readonly openAPIV3Schema: Schema };
    }[];
  };
}

/** The page of resources. */
export function resourcesPage(): string {
  const parts = [...generateCrds().values()].flatMap((text) => {
    const { spec } = parse(text) as Definition;
    const schema = spec.versions[0]?.schema.openAPIV3Schema ?? {};
    return [
      `## ${spec.names.kind}\n\n${schema.description ?? ''}`,
      ...['spec', 'status'].map((part) => {
        const rows = rowsOf(schema.properties?.[part] ?? {}, part);
        return tableOf(['field', 'type', 'default', 'meaning and limits'], rows);
      }),
    ];
  });
  return pageOf({ title: 'ModelService and Tenant', source: 'the CRDs', parts });
}

function rowsOf(schema: Schema, path: string): string[][] {
  const inner = schema.type === 'array' ? (schema.items ?? {}) : schema;
  const inside = schema.type === 'array' ? `${path}[]` : path;
  return Object.entries(inner.properties ?? {}).flatMap(([name, field]) => {
    const at = `${inside}.${name}`;
    const needed = inner.required?.includes(name) === true && field.default === undefined;
    return [
      [code(at), typeOf(field), needed ? 'required' : defaultOf(field), meaningOf(field)],
      ...rowsOf(field, at),
    ];
  });
}

function typeOf({ type, items }: Schema): string {
  return type === 'array' ? `list of ${items?.type ?? 'any'}` : (type ?? 'any');
}

function defaultOf({ default: value }: Schema): string {
  return value === undefined ? '' : code(JSON.stringify(value));
}

function meaningOf(schema: Schema): string {
  const { description = '', enum: words, minimum, maximum, maxLength, maxItems } = schema;
  const limits = [
    words === undefined ? '' : `One of ${words.map(code).join(', ')}.`,
    minimum === undefined ? '' : maximum === undefined ? `At least ${minimum}.` : `${minimum} to ${maximum}.`,
    maxLength === undefined ? '' : `At most ${maxLength} characters.`,
    maxItems === undefined ? '' : `At most ${maxItems} entries.`,
    ...(schema['x-kubernetes-validations'] ?? []).map(({ message }) => `Rule: ${message}.`),
  ];
  return [description, ...limits].filter((text) => text !== '').join(' ');
}
