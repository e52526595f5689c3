// ModelService, group mimo-cluster.dev/v1alpha1: the one place where its fields, defaults, limits and rules are
// written; tenant.ts has those of Tenant, schema.ts what both are made of. From them come the TypeScript types, the
// controller's own check (parseModelService, parseTenant) and the CRD YAML (crd-generate.ts). Knows no pods and no API
// server; status.ts holds what the controller reports back.

import { z } from 'zod';

import { amountOf } from './quantity.ts';
import {
  dnsLabel,
  dnsName,
  keyedList,
  metadata,
  parseResource,
  quantity,
  seconds,
  stringMap,
  text,
  withRules,
  type ResourceMetadata,
} from './schema.ts';

export const resourceGroup = 'mimo-cluster.dev';
export const resourceVersion = 'v1alpha1';

const source = withRules(
  z
    .object({
      hub: z
        .object({
          repository: text(200)
            .regex(/^[\w.-]+\/[\w.-]+$/)
            .describe('owner/name on the hub.'),
          revision: text(100).default('main').describe('Branch, tag or commit; pin a commit in production.'),
          tokenSecret: z
            .object({ name: dnsName, key: text(253).default('token') })
            .describe('A Secret of this namespace with the access token of a private repository.')
            .optional(),
        })
        .describe('A checkpoint fetched from the hub into the cache.')
        .optional(),
      volumeClaim: z
        .object({ claimName: dnsName, path: text(1024).default('.') })
        .describe('A checkpoint directory on a PersistentVolumeClaim of this namespace.')
        .optional(),
      hostPath: text(1024)
        .regex(/^\//)
        .describe('A checkpoint directory on every machine that may run the model.')
        .optional(),
    })
    .describe('Where the checkpoint comes from: exactly one of hub, volumeClaim, hostPath.'),
  [
    {
      cel: '[has(self.hub), has(self.volumeClaim), has(self.hostPath)].filter(x, x).size() == 1',
      message: 'exactly one of hub, volumeClaim and hostPath must be set',
      holds: (value) =>
        [value.hub, value.volumeClaim, value.hostPath].filter((given) => given !== undefined).length === 1,
    },
  ],
);

const model = withRules(
  z
    .object({
      name: text(128)
        .regex(/^[\w./-]+$/)
        .describe('The name that clients ask for. Immutable: requests are queued under it.'),
      source,
      precision: z
        .enum(['fp32', 'fp16', 'bf16', 'int8', 'int4'])
        .default('int8')
        .describe('int8 gives the same tokens alone or in any batch, at half the memory of bf16.'),
    })
    .describe('The model to serve.'),
  [],
  [{ cel: 'self.name == oldSelf.name', message: 'name is immutable: requests are queued under it' }],
);

const speculation = z
  .object({
    draftTokens: z
      .int()
      .min(0)
      .max(1)
      .default(1)
      .describe('Tokens that the MTP layer drafts per step; 0 turns speculation off.'),
    adaptive: z.boolean().default(true).describe('Drafts only while verifying them costs little.'),
  })
  .describe('Multi-token prediction; it never changes what is generated.');

const rankResources = withRules(
  z
    .object({
      cpu: quantity.default('4'),
      memory: quantity.default('16Gi'),
      accelerators: z.int().min(0).max(8).default(0).describe('Accelerators of each rank; 0 means the CPU.'),
      acceleratorResource: text(253)
        .regex(/^[a-z0-9.-]+\/[\w.-]+$/)
        .default('nvidia.com/gpu')
        .describe('The extended resource that a device plugin offers.'),
      executionProvider: z
        .enum(['cpu', 'cuda'])
        .optional()
        .describe('Where the ranks compute. Default: cuda with accelerators, else cpu.'),
      kvCache: quantity
        .optional()
        .describe(
          'Memory of each rank for the KV cache, on its device. Default: all memory that the weights leave free.',
        ),
    })
    .describe('The resources of one rank, as both request and limit.'),
  [
    {
      cel: "has(self.executionProvider) && self.executionProvider == 'cuda' ? self.accelerators > 0 : true",
      message: 'executionProvider cuda needs accelerators',
      holds: (value) => value.executionProvider !== 'cuda' || value.accelerators > 0,
    },
    {
      cel:
        'has(self.kvCache) && self.accelerators == 0 ' +
        '? quantity(self.kvCache).isLessThan(quantity(self.memory)) : true',
      message: 'kvCache must be less than memory, which holds the weights too',
      holds: ({ kvCache, accelerators, memory }) =>
        kvCache === undefined || accelerators > 0 || amountOf(kvCache) < amountOf(memory),
    },
  ],
);

const scaling = withRules(
  z
    .object({
      min: z
        .int()
        .min(0)
        .max(1000)
        .default(0)
        .describe(
          'Minimum number of groups; 0 lets an idle model scale to zero. kubectl scale sets this field.',
        ),
      max: z.int().min(1).max(1000).default(1).describe('Maximum number of groups.'),
      targetWaitSeconds: seconds(1, 3600)
        .default(30)
        .describe('Target for how long a request waits for its first step.'),
      groupTokensPerSecond: z
        .int()
        .min(1)
        .max(10_000_000)
        .default(1000)
        .describe(
          'First guess of the speed of one full group, in prompt plus permitted completion tokens; later measured.',
        ),
      startUpSeconds: seconds(1, 3600)
        .default(60)
        .describe('First guess of the time from creating a group until it is ready; later measured.'),
      memorySeconds: seconds(60, 7200)
        .optional()
        .describe(
          'How far back the autoscaler considers arrivals. Default: 120 s plus three times the start-up time.',
        ),
      scaleToZeroAfterSeconds: seconds(0, 86_400)
        .default(300)
        .describe('Idle time before the last group is removed.'),
    })
    .describe('How many replica groups run.'),
  [
    {
      cel: 'self.min <= self.max',
      message: 'min must not be more than max',
      holds: (value) => value.min <= value.max,
    },
  ],
);

const rollout = withRules(
  z
    .object({
      maxSurge: z
        .int()
        .min(0)
        .max(1000)
        .default(1)
        .describe('Groups above the wanted count during a rollout.'),
      maxUnavailable: z
        .int()
        .min(0)
        .max(1000)
        .default(0)
        .describe('Groups below the wanted count during a rollout.'),
    })
    .describe('How groups are replaced after a change of the template; counted in groups.'),
  [
    {
      cel: 'self.maxSurge + self.maxUnavailable > 0',
      message: 'maxSurge and maxUnavailable must not both be 0',
      holds: (value) => value.maxSurge + value.maxUnavailable > 0,
    },
  ],
);

/** As in Kubernetes' pods, so that a mistake is rejected here and not at the creation of the first pod. */
const toleration = withRules(
  z
    .object({
      key: text(253).optional(),
      operator: z.enum(['Exists', 'Equal']).default('Equal'),
      value: z.string().max(63).optional(),
      effect: z.enum(['NoSchedule', 'PreferNoSchedule', 'NoExecute']).optional(),
      tolerationSeconds: seconds(0, 7 * 86_400)
        .describe('How long a pod stays after its machine gets the taint; default for a lost machine: 30.')
        .optional(),
    })
    .describe('A taint of machines that the pods tolerate.'),
  [
    {
      cel: "has(self.key) || self.operator == 'Exists'",
      message: 'operator must be Exists if key is empty',
      holds: ({ key, operator }) => key !== undefined || operator === 'Exists',
    },
    {
      cel: "!has(self.value) || self.operator == 'Equal'",
      message: 'operator must be Equal if value is set',
      holds: ({ value, operator }) => value === undefined || operator === 'Equal',
    },
    {
      cel: "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
      message: 'effect must be NoExecute if tolerationSeconds is set',
      holds: ({ tolerationSeconds, effect }) => tolerationSeconds === undefined || effect === 'NoExecute',
    },
  ],
);

const template = z
  .object({
    image: text(512).optional().describe("The worker's image; default: the controller's setting."),
    imagePullPolicy: z
      .enum(['Always', 'IfNotPresent', 'Never'])
      .optional()
      .describe("Default: the controller's setting."),
    imagePullSecrets: keyedList(z.object({ name: dnsName }), 'name', 16),
    labels: stringMap,
    annotations: stringMap,
    nodeSelector: stringMap,
    tolerations: z.array(toleration).max(32).default([]).meta({ 'x-kubernetes-list-type': 'atomic' }),
    priorityClassName: dnsName.optional(),
    runtimeClassName: dnsName.optional(),
    serviceAccountName: dnsName.optional(),
    env: keyedList(
      z.object({ name: text(128).regex(/^[A-Z_][A-Z0-9_]*$/), value: z.string().max(4096).default('') }),
      'name',
      64,
    ),
    cacheVolumeClaim: dnsName
      .optional()
      .describe(
        "A volume claim that keeps compiled shards across restarts; default: the controller's setting.",
      ),
  })
  .describe('Additions to the pods.');

const cudaPrecisions: ReadonlySet<string> = new Set(['fp16', 'bf16']);

const serviceFields = z.object({
  model,
  tensorParallel: z.literal([1, 2, 4, 8]).default(1).describe('Ranks that share one copy of the model.'),
  speculation: speculation.prefault({}),
  engine: z.enum(['onnxruntime']).default('onnxruntime').describe('The inference engine; only one so far.'),
  resources: rankResources.prefault({}),
  placement: z
    .enum(['pod', 'spread'])
    .default('pod')
    .describe('pod: all ranks in one pod; spread: one pod per rank, on any machines.'),
  scaling: scaling.prefault({}),
  rollout: rollout.prefault({}),
  drainSeconds: seconds(0, 86_400)
    .default(120)
    .describe(
      'How long a removed group may finish its requests; the rest moves to groups with the same model identity, ' +
        'and ends with ABORTED if a change of model or precision leaves none.',
    ),
  template: template.prefault({}),
});

export const modelServiceSpec = withRules(serviceFields, [
  {
    cel:
      "(has(self.resources.executionProvider) ? self.resources.executionProvider == 'cuda' " +
      ": self.resources.accelerators > 0) ? self.model.precision in ['fp16', 'bf16'] : true",
    message:
      'accelerators compute in fp16 or bf16: set model.precision, or resources.executionProvider to cpu',
    holds: (value) =>
      executionProviderOf(value.resources) === 'cpu' || cudaPrecisions.has(value.model.precision),
  },
]);

/** A rank's execution provider: as given, else cuda with accelerators and cpu without. */
export function executionProviderOf(
  resources: Pick<z.output<typeof rankResources>, 'executionProvider' | 'accelerators'>,
): 'cpu' | 'cuda' {
  return resources.executionProvider ?? (resources.accelerators > 0 ? 'cuda' : 'cpu');
}

/** A complete spec: every default filled in. */
export type ModelServiceSpec = z.output<typeof modelServiceSpec>;
export type ScalingSpec = ModelServiceSpec['scaling'];

/** `<name>-<revision>-<group>-<rank>` must stay a DNS label, and is a host name with placement spread. */
export const serviceNameMaxLength = 40;

export interface ModelService {
  readonly metadata: ResourceMetadata;
  readonly spec: ModelServiceSpec;
}

/**
 * Reads a ModelService from the API server and fills in defaults. Throws `invalid_argument` with every problem by
 * field: an object stored before a rule existed can still break it.
 */
export function parseModelService(value: unknown): ModelService {
  const named = metadata.extend({ name: dnsLabel.max(serviceNameMaxLength) });
  return parseResource(z.object({ metadata: named, spec: modelServiceSpec }), value, 'ModelService');
}
