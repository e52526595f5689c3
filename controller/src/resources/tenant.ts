// Tenant, group mimo-cluster.dev/v1alpha1: its fields, defaults and limits, as resources.ts has them for ModelService.

import { z } from 'zod';

import { dnsName, metadata, parseResource, text, type ResourceMetadata } from './schema.ts';

export const tenantSpec = z.object({
  apiKeys: z
    .array(
      z.object({
        secretName: dnsName,
        key: text(253).default('apiKey').describe("The Secret's entry with the SHA-256 of the key, in hex."),
      }),
    )
    .min(1)
    .max(32)
    .meta({ 'x-kubernetes-list-type': 'map', 'x-kubernetes-list-map-keys': ['secretName', 'key'] })
    .describe('Hashes of the API keys of this tenant.'),
  weight: z
    .int()
    .min(1)
    .max(10_000)
    .default(100)
    .describe('Share of a busy cluster relative to other tenants.'),
  priorityClass: z.enum(['critical', 'standard', 'batch']).default('standard'),
  limits: z
    .object({
      tokensPerMinute: z.int().min(1).max(2_000_000_000).optional(),
      requestsPerMinute: z.int().min(1).max(100_000_000).optional(),
      maxInFlight: z.int().min(1).max(100_000).optional().describe('Accepted and unfinished requests.'),
    })
    .prefault({})
    .describe('Absent limits mean unlimited.'),
  allowedModels: z
    .array(text(128))
    .max(256)
    .default([])
    .meta({ 'x-kubernetes-list-type': 'set' })
    .describe('Names of the allowed models; empty: every model.'),
});

/** A complete tenant spec. Gateways enforce the limits; the controller only passes them on. */
export type TenantSpec = z.output<typeof tenantSpec>;

export interface Tenant {
  readonly metadata: ResourceMetadata;
  readonly spec: TenantSpec;
}

/** Reads a Tenant; like parseModelService. */
export function parseTenant(value: unknown): Tenant {
  return parseResource(z.object({ metadata, spec: tenantSpec }), value, 'Tenant');
}
