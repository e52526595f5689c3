// The controller's settings: one table with the defaults and their reasons, and the checks across fields. Its input
// is the environment that main.ts passes; nothing else reads it.

import {
  addressSetting,
  choiceSetting,
  durationSetting,
  integerSetting,
  listSetting,
  natsServersSetting,
  parseConfig,
  textSetting,
  type ConfigOf,
  type Environment,
} from '@mimo/core/process/config';
import { logLevels } from '@mimo/core/process/log';

import type { Toleration, WorkerSettings } from './decide/containers.ts';

const nodeLabel = /^([^=\s]+)=([^=\s]*)$/;
const taint = /^([^=:\s]+)(?:=([^=:\s]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?$/;

/** The controller's settings by their variables. */
export const controllerSettings = {
  /** The one namespace whose ModelServices and Tenants are served; the pods are made there too. */
  namespace: textSetting('MIMO_CONTROLLER_NAMESPACE'),
  /** Path of a kubeconfig; empty: the pod's own service account. */
  kubeconfig: textSetting('MIMO_CONTROLLER_KUBECONFIG', ''),
  /** Comma-separated. */
  natsUrls: natsServersSetting('MIMO_CONTROLLER_NATS_URLS'),
  /** A .creds file from `nsc`, or one line with user:password or a token; empty: the servers require none. */
  natsCredentialsFile: textSetting('MIMO_CONTROLLER_NATS_CREDENTIALS_FILE', ''),
  /** Must match the gateways: the first client creates the stream. */
  natsReplicas: integerSetting('MIMO_CONTROLLER_NATS_REPLICAS', { min: 1, max: 5 }, 1),
  recordMaxAgeMs: durationSetting('MIMO_CONTROLLER_RECORD_MAX_AGE', '24h'),

  workerImage: textSetting('MIMO_CONTROLLER_WORKER_IMAGE'),
  /** Image for services with accelerators; default: the same image. */
  workerCudaImage: textSetting('MIMO_CONTROLLER_WORKER_CUDA_IMAGE', ''),
  workerImagePullPolicy: choiceSetting(
    'MIMO_CONTROLLER_WORKER_IMAGE_PULL_POLICY',
    ['Always', 'IfNotPresent', 'Never'],
    'IfNotPresent',
  ),
  /** The queue's address for workers; default: the same as for this process. */
  workerNatsUrl: textSetting('MIMO_CONTROLLER_WORKER_NATS_URL', ''),
  /** The Secret with the workers' credentials, in its entry `credentials`; empty: the servers require none. */
  workerNatsCredentialsSecret: textSetting('MIMO_CONTROLLER_WORKER_NATS_CREDENTIALS_SECRET', ''),
  /**
   * Volume claim for compiled shards, unless a service names its own. Without a claim or host path each pod compiles
   * at every start.
   */
  cacheVolumeClaim: textSetting('MIMO_CONTROLLER_CACHE_VOLUME_CLAIM', ''),
  cacheHostPath: textSetting('MIMO_CONTROLLER_CACHE_HOST_PATH', ''),

  /** Service account of worker pods, unless a service names another; empty: the namespace's default. */
  workerServiceAccount: textSetting('MIMO_CONTROLLER_WORKER_SERVICE_ACCOUNT', ''),
  /** Names of Secrets with registry credentials, for every worker pod. */
  imagePullSecrets: listSetting('MIMO_CONTROLLER_IMAGE_PULL_SECRETS', ''),
  /** Runtime class of pods with accelerators, unless a service sets one; empty: the machine's default runtime. */
  acceleratorRuntimeClass: textSetting('MIMO_CONTROLLER_ACCELERATOR_RUNTIME_CLASS', ''),
  /** `label=value`, comma-separated. */
  acceleratorNodeSelector: listSetting('MIMO_CONTROLLER_ACCELERATOR_NODE_SELECTOR', ''),
  /** As kubectl writes taints: `key=value:effect`, `key:effect` for any value, `key` for any effect too. */
  acceleratorTolerations: listSetting('MIMO_CONTROLLER_ACCELERATOR_TOLERATIONS', ''),

  /** One controller acts at a time: the holder of this Lease. */
  leaseName: textSetting('MIMO_CONTROLLER_LEASE_NAME', 'mimo-controller'),
  /** This process's name among the candidates; the pod's name in a cluster. Default: generated. */
  identity: textSetting('MIMO_CONTROLLER_IDENTITY', ''),
  /** The Secret that gateways read their API keys from. */
  tenantSecret: textSetting('MIMO_CONTROLLER_TENANT_SECRET', 'mimo-tenant-keys'),
  /** /metrics, /healthz and /readyz. */
  listen: addressSetting('MIMO_CONTROLLER_LISTEN', '0.0.0.0:9465'),
  logLevel: choiceSetting('MIMO_CONTROLLER_LOG_LEVEL', logLevels, 'info'),
} as const;

/** The controller's configuration; '' for optional texts that are not set. */
export type ControllerConfig = ConfigOf<typeof controllerSettings>;

/** Reads the environment; fails with `invalid_argument` and lists every problem. */
export function parseControllerConfig(env: Environment): ControllerConfig {
  return parseConfig(
    {
      prefix: 'MIMO_CONTROLLER_',
      settings: controllerSettings,
      check: ({
        natsUrls,
        cacheVolumeClaim,
        cacheHostPath,
        acceleratorNodeSelector,
        acceleratorTolerations,
      }) => [
        ...(natsUrls.length === 0 ? ['MIMO_CONTROLLER_NATS_URLS must name at least one server'] : []),
        ...(cacheVolumeClaim !== '' && cacheHostPath !== ''
          ? ['MIMO_CONTROLLER_CACHE_VOLUME_CLAIM and MIMO_CONTROLLER_CACHE_HOST_PATH exclude each other']
          : []),
        ...(cacheHostPath === '' || cacheHostPath.startsWith('/')
          ? []
          : [`MIMO_CONTROLLER_CACHE_HOST_PATH must begin with /, not "${cacheHostPath}"`]),
        ...acceleratorNodeSelector.flatMap((entry) =>
          nodeLabel.test(entry)
            ? []
            : [`MIMO_CONTROLLER_ACCELERATOR_NODE_SELECTOR must hold label=value, not "${entry}"`],
        ),
        ...acceleratorTolerations.flatMap((entry) =>
          taint.test(entry)
            ? []
            : [`MIMO_CONTROLLER_ACCELERATOR_TOLERATIONS must hold key[=value][:effect], not "${entry}"`],
        ),
      ],
    },
    env,
  );
}

/** The worker part of the configuration. */
export function workerSettingsOf(config: ControllerConfig): WorkerSettings {
  const { workerImage, workerCudaImage, cacheVolumeClaim, cacheHostPath, natsUrls, workerNatsUrl } = config;
  return {
    image: workerImage,
    cudaImage: workerCudaImage || workerImage,
    imagePullPolicy: config.workerImagePullPolicy,
    natsUrl: workerNatsUrl || natsUrls.join(','),
    natsCredentialsSecret: config.workerNatsCredentialsSecret,
    cache:
      cacheVolumeClaim !== ''
        ? { kind: 'claim', claimName: cacheVolumeClaim }
        : cacheHostPath !== ''
          ? { kind: 'hostPath', path: cacheHostPath }
          : { kind: 'pod' },
    podDefaults: {
      serviceAccountName: config.workerServiceAccount,
      imagePullSecrets: config.imagePullSecrets,
      accelerated: {
        runtimeClassName: config.acceleratorRuntimeClass,
        nodeSelector: Object.fromEntries(config.acceleratorNodeSelector.map(labelOf)),
        tolerations: config.acceleratorTolerations.map(tolerationOf),
      },
    },
  };
}

function labelOf(text: string): readonly [string, string] {
  const [, label = '', value = ''] = nodeLabel.exec(text) ?? [];
  return [label, value];
}

function tolerationOf(text: string): Toleration {
  const [, key = '', value, effect] = taint.exec(text) ?? [];
  return {
    key,
    ...(value === undefined ? { operator: 'Exists' } : { operator: 'Equal', value }),
    ...(effect === undefined ? {} : { effect }),
  };
}
