// Accepted specs, and rejected specs with the message that names the problem. One table for both validators:
// resources.test.ts checks our own, tests/kubernetes/resources.test.ts the API server's, by the CRDs. Paths are as
// the API server writes them.

const source = { hub: { repository: 'XiaomiMiMo/MiMo-7B-RL' } };
const model = { name: 'mimo-7b-rl', source };

/** A ModelService's spec plus the given fields of a case below. */
export function specWith(spec: object): object {
  return { model, ...spec };
}

/** Taken. */
export const acceptedSpecs: readonly (readonly [what: string, spec: object])[] = [
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
  ['a toleration', { template: { tolerations: [{ key: 'gpu', operator: 'Exists', effect: 'NoSchedule' }] } }],
  ['any taint', { template: { tolerations: [{ operator: 'Exists' }] } }],
  [
    'a lost machine for a minute',
    {
      template: {
        tolerations: [
          {
            key: 'node.kubernetes.io/unreachable',
            operator: 'Exists',
            effect: 'NoExecute',
            tolerationSeconds: 60,
          },
        ],
      },
    },
  ],
  [
    'a private repository',
    { model: { ...model, source: { hub: { repository: 'a/b', tokenSecret: { name: 'hub' } } } } },
  ],
  ['a cache of its own', { template: { cacheVolumeClaim: 'shards', imagePullPolicy: 'Never' } }],
  ['a thousand groups', { scaling: { min: 1000, max: 1000 } }],
  ['variables', { template: { env: [{ name: 'MIMO_WORKER_THREADS', value: '8' }] } }],
];

/** Refused. */
export const refusedSpecs: readonly (readonly [what: string, spec: object, words: string])[] = [
  ['no source', { model: { ...model, source: {} } }, 'exactly one of'],
  ['two sources', { model: { ...model, source: { ...source, hostPath: '/x' } } }, 'exactly one of'],
  ['a relative host path', { model: { ...model, source: { hostPath: 'x' } } }, 'spec.model.source.hostPath'],
  [
    'a hub id without owner',
    { model: { ...model, source: { hub: { repository: 'MiMo' } } } },
    'spec.model.source.hub.repository',
  ],
  [
    'a claim name in capitals',
    { model: { ...model, source: { volumeClaim: { claimName: 'A' } } } },
    'spec.model.source.volumeClaim.claimName',
  ],
  ['a nameless model', { model: { ...model, name: '' } }, 'spec.model.name'],
  ['a model name with spaces', { model: { ...model, name: 'a b' } }, 'spec.model.name'],
  ['a precision nobody has', { model: { ...model, precision: 'fp8' } }, 'spec.model.precision'],
  ['three ranks', { tensorParallel: 3 }, 'spec.tensorParallel'],
  ['sixteen ranks', { tensorParallel: 16 }, 'spec.tensorParallel'],
  ['a textual rank count', { tensorParallel: '2' }, 'spec.tensorParallel'],
  ['negative drafts', { speculation: { draftTokens: -1 } }, 'spec.speculation.draftTokens'],
  ['many drafts', { speculation: { draftTokens: 2 } }, 'spec.speculation.draftTokens'],
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
  [
    'a device without domain',
    { resources: { acceleratorResource: 'gpu' } },
    'spec.resources.acceleratorResource',
  ],
  ['a drain of a week', { drainSeconds: 604_800 }, 'spec.drainSeconds'],
  ['a variable in small letters', { template: { env: [{ name: 'threads' }] } }, 'spec.template.env[0].name'],
  ['a variable twice', { template: { env: [{ name: 'A' }, { name: 'A' }] } }, 'spec.template.env'],
  [
    'a pull policy in small letters',
    { template: { imagePullPolicy: 'always' } },
    'spec.template.imagePullPolicy',
  ],
  [
    'a service account with a space',
    { template: { serviceAccountName: 'a b' } },
    'spec.template.serviceAccountName',
  ],
  [
    'a token Secret in capitals',
    { model: { ...model, source: { hub: { repository: 'a/b', tokenSecret: { name: 'A' } } } } },
    'spec.model.source.hub.tokenSecret.name',
  ],
  ['memory for keys and values in words', { resources: { kvCache: 'half' } }, 'spec.resources.kvCache'],
  [
    'a device that does not compute',
    { resources: { executionProvider: 'tpu' } },
    'spec.resources.executionProvider',
  ],
  [
    'an unknown toleration',
    { template: { tolerations: [{ key: 'gpu', effect: 'Never' }] } },
    'spec.template.tolerations[0].effect',
  ],
  [
    'a toleration of every taint with one value',
    { template: { tolerations: [{ value: 'gpu' }] } },
    'spec.template.tolerations[0]',
  ],
  [
    'a toleration of a value that must only exist',
    { template: { tolerations: [{ key: 'gpu', operator: 'Exists', value: 'yes' }] } },
    'spec.template.tolerations[0]',
  ],
  [
    'a toleration for a while of what evicts nobody',
    { template: { tolerations: [{ key: 'gpu', effect: 'NoSchedule', tolerationSeconds: 5 }] } },
    'spec.template.tolerations[0]',
  ],
];

/** Tenants. */
export const acceptedTenants: readonly (readonly [what: string, spec: object])[] = [
  ['a key', { apiKeys: [{ secretName: 'team-a' }] }],
  ['two keys of one Secret', { apiKeys: [{ secretName: 'a' }, { secretName: 'a', key: 'second' }] }],
  ['limits and models', { apiKeys: [{ secretName: 'a' }], limits: { maxInFlight: 9 }, allowedModels: ['m'] }],
];

export const refusedTenants: readonly (readonly [what: string, spec: object, words: string])[] = [
  ['no keys', { apiKeys: [] }, 'spec.apiKeys'],
  ['a Secret in capitals', { apiKeys: [{ secretName: 'A' }] }, 'spec.apiKeys[0].secretName'],
  ['no weight', { apiKeys: [{ secretName: 'a' }], weight: 0 }, 'spec.weight'],
  ['a class nobody has', { apiKeys: [{ secretName: 'a' }], priorityClass: 'vip' }, 'spec.priorityClass'],
  [
    'a negative limit',
    { apiKeys: [{ secretName: 'a' }], limits: { maxInFlight: -1 } },
    'spec.limits.maxInFlight',
  ],
];
