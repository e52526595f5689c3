// What the schemas of our resources are made of: rules across fields, written twice side by side, as CEL for the API
// server and as a predicate for us; lists with keys; names and amounts; metadata; and reading an object by a schema.

import { ClusterError } from '@mimo/core/process/errors';
import { z } from 'zod';

/** A rule across fields: the same condition for the API server (`cel`) and here (`holds`). */
interface Rule<T> {
  readonly cel: string;
  readonly message: string;
  readonly holds: (value: T) => boolean;
}

/** A rule about a change, which only the API server can check because only it sees the old object. */
interface TransitionRule {
  readonly cel: string;
  readonly message: string;
}

export function withRules<S extends z.ZodType>(
  schema: S,
  rules: readonly Rule<z.output<S>>[],
  transitions: readonly TransitionRule[] = [],
): S {
  let checked = schema;
  for (const { holds, message } of rules) {
    checked = checked.refine(holds, { message });
  }
  const validations = [...rules, ...transitions].map(({ cel, message }) => ({ rule: cel, message }));
  return checked.meta({ ...schema.meta(), 'x-kubernetes-validations': validations });
}

/** A list that server-side apply merges by the given key, which no two entries share. */
export function keyedList<S extends z.ZodObject>(
  item: S,
  key: string & keyof z.output<S>,
  maxItems: number,
): z.ZodDefault<z.ZodArray<S>> {
  return z
    .array(item)
    .max(maxItems)
    .refine((entries) => new Set(entries.map((entry) => entry[key])).size === entries.length, {
      message: `entries must differ in ${key}`,
    })
    .default([])
    .meta({ 'x-kubernetes-list-type': 'map', 'x-kubernetes-list-map-keys': [key] });
}

export const dnsLabel = z
  .string()
  .min(1)
  .max(63)
  .regex(/^[a-z0-9]([-a-z0-9]*[a-z0-9])?$/);
export const dnsName = z
  .string()
  .min(1)
  .max(253)
  .regex(/^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/);
export const quantity = z
  .string()
  .max(32)
  .regex(/^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$/);
export const text = (maxLength: number): z.ZodString => z.string().min(1).max(maxLength);
export const stringMap = z.record(z.string(), z.string().max(4096)).default({});
export const seconds = (min: number, max: number): z.ZodInt => z.int().min(min).max(max);

export const metadata = z.object({
  name: dnsLabel,
  namespace: dnsLabel,
  uid: z.string(),
  generation: z.int().default(1),
  resourceVersion: z.string().default(''),
  deletionTimestamp: z.string().optional(),
  finalizers: z.array(z.string()).default([]),
});

/** The metadata that decisions need. */
export type ResourceMetadata = z.output<typeof metadata>;

/** Reads an object by a schema. Throws `invalid_argument` that lists every problem by field. */
export function parseResource<S extends z.ZodType>(schema: S, value: unknown, kind: string): z.output<S> {
  const result = schema.safeParse(value);
  if (result.success) {
    return result.data;
  }
  const problems = result.error.issues.map(
    ({ path, message }) => `${path.join('.') || 'object'}: ${message}`,
  );
  throw new ClusterError('invalid_argument', `${kind}: ${problems.join('; ')}`);
}
