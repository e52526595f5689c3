// What the controller writes into `status`: its schema (crd-generate.ts puts it into the CRDs) and types. People read
// the decision part with `kubectl describe`: inputs, formula, clamps, reason and blocker.

import { z } from 'zod';

const count = z.int().min(0);
const time = z.string().max(64).meta({ format: 'date-time' });

const condition = z.object({
  type: z.string().min(1).max(316),
  status: z.enum(['True', 'False', 'Unknown']),
  observedGeneration: z.int().min(0),
  lastTransitionTime: time,
  reason: z.string().min(1).max(1024),
  message: z.string().max(32_768),
});

/** A Kubernetes condition, always with the generation it was judged from. */
export type Condition = z.output<typeof condition>;

const conditions = z
  .array(condition)
  .max(16)
  .meta({ 'x-kubernetes-list-type': 'map', 'x-kubernetes-list-map-keys': ['type'] });

/** Why the count has its value. */
export const scaleReasons = [
  'QueueUnknown',
  'Oldest',
  'Backlog',
  'RecentLoad',
  'Learning',
  'Stabilising',
  'KeepWarm',
  'Idle',
] as const;

export type ScaleReason = (typeof scaleReasons)[number];

const scaleInputs = z.object({
  readyGroups: count,
  startingGroups: count,
  waitingRequests: count.optional(),
  waitingTokens: count.optional(),
  inFlightTokens: count.optional(),
  oldestWaitingSeconds: count.optional(),
  arrivalTokensPerSecond: count.optional(),
  groupTokensPerSecond: count,
  startUpSeconds: count,
});

export const scaleDecision = z.object({
  wanted: count.describe('Groups that should exist.'),
  before: count.describe('Groups that the previous decision wanted.'),
  reason: z.enum(scaleReasons),
  message: z.string().max(1024).describe('The decision in one sentence.'),
  formula: z.string().max(1024).describe('The rule with its numbers.'),
  clamps: z.array(z.string().max(256)).max(8).describe('Limits that changed the result of the formula.'),
  blocker: z.string().max(1024).optional().describe('What prevents the wanted groups from serving.'),
  inputs: scaleInputs,
});

/** One scaling decision, explained; absent inputs were unknown. */
export type ScaleDecision = z.output<typeof scaleDecision>;

export const modelServiceStatus = z.object({
  observedGeneration: z.int().min(0).optional(),
  conditions: conditions.optional(),
  replicas: count.optional().describe('Existing groups, as the scale subresource reports.'),
  selector: z.string().max(512).optional().describe('Label selector of the pods, for the scale subresource.'),
  revision: z.string().max(63).optional().describe('Revision of the current template.'),
  preparedModel: z
    .string()
    .max(63)
    .optional()
    .describe('Hash of the source, precision and tensorParallel that were last found and prepared.'),
  groups: z
    .object({
      wanted: count,
      ready: count,
      updated: count.describe('Groups of the current revision.'),
      draining: count,
    })
    .optional(),
  queue: z
    .object({
      waitingRequests: count.optional(),
      waitingTokens: count.optional(),
      oldestWaitingSeconds: count.optional(),
    })
    .describe('Absent fields are unknown, not zero.')
    .optional(),
  lastDecision: scaleDecision.extend({ time }).optional(),
});

export type ModelServiceStatus = z.output<typeof modelServiceStatus>;

export const tenantStatus = z.object({
  observedGeneration: z.int().min(0).optional(),
  conditions: conditions.optional(),
});

/** Types of the conditions of a ModelService. */
export type ConditionType = 'ModelFound' | 'Ready' | 'Progressing' | 'ScalingActive' | 'Degraded';
