// The environment of a worker's container, which worker/src/config.ts reads: what a rank computes and from which files,
// its place in the group, and its ports. Pure.

import { amountOf } from '../resources/quantity.ts';
import { executionProviderOf, type ModelService, type ModelServiceSpec } from '../resources/resources.ts';
import { podName, rankServiceName } from './labels.ts';

export interface GroupIdentity {
  readonly group: string;
  readonly revision: string;
  readonly index: number;
  /** Random for each life of a group: ranks reject ranks of another life. */
  readonly groupToken: string;
}

export const workerPort = 50_052;
export const peerPort = 50_152;
export const metricsPort = 9464;
/** Time between SIGTERM and SIGKILL: a hand-over takes seconds, and long work has drained before the pod is deleted. */
export const terminationGraceSeconds = 30;
const threadsMax = 256;
/** A directory, not a file: only then does the kubelet update changed credentials in running pods. */
export const credentialsDirectory = '/etc/mimo/nats';

/** The NATS settings of the controller's configuration. */
interface NatsSettings {
  readonly natsUrl: string;
  readonly natsCredentialsSecret?: string;
}

/** Ranks of one pod share its address, so each has its own ports. */
export function portOffset({ placement }: ModelServiceSpec, rank: number): number {
  return placement === 'spread' ? 0 : rank;
}

type Variables = Readonly<Record<string, string>>;

/** The variables of one rank, as a container has them. */
export function rankVariables(
  service: ModelService,
  identity: GroupIdentity,
  { settings, rank }: { readonly settings: NatsSettings; readonly rank: number },
): readonly Readonly<Record<string, unknown>>[] {
  const { spec } = service;
  const variables: Variables = {
    MIMO_WORKER_GROUP: identity.group,
    MIMO_WORKER_REVISION: identity.revision,
    MIMO_WORKER_GROUP_TOKEN: identity.groupToken,
    MIMO_WORKER_RANK: String(rank),
    ...modelVariables(spec),
    ...networkVariables(service, identity, rank),
    MIMO_WORKER_NATS_URL: settings.natsUrl,
    ...(settings.natsCredentialsSecret
      ? { MIMO_WORKER_NATS_CREDENTIALS_FILE: `${credentialsDirectory}/credentials` }
      : {}),
    // The template's variables come last and win.
    ...Object.fromEntries(spec.template.env.map(({ name, value }) => [name, value])),
  };
  const { tokenSecret } = spec.model.source.hub ?? {};
  return [
    // First: later variables may contain $(POD_IP).
    { name: 'POD_IP', valueFrom: { fieldRef: { fieldPath: 'status.podIP' } } },
    ...(tokenSecret === undefined
      ? []
      : [
          { name: 'HF_TOKEN', valueFrom: { secretKeyRef: { name: tokenSecret.name, key: tokenSecret.key } } },
        ]),
    ...Object.entries(variables).map(([name, value]) => ({ name, value })),
  ];
}

/** What a rank computes, from which files, and with what. */
function modelVariables(spec: ModelServiceSpec): Variables {
  const { model, speculation, resources, tensorParallel } = spec;
  const { hub } = model.source;
  return {
    MIMO_WORKER_MODEL: model.name,
    MIMO_WORKER_CHECKPOINT_DIRECTORY: checkpointDirectory(spec),
    ...(hub === undefined
      ? {}
      : { MIMO_WORKER_HUB_REPOSITORY: hub.repository, MIMO_WORKER_HUB_REVISION: hub.revision }),
    MIMO_WORKER_CACHE_DIRECTORY: '/cache',
    MIMO_WORKER_PRECISION: model.precision,
    MIMO_WORKER_DRAFT_TOKENS: String(speculation.draftTokens),
    MIMO_WORKER_ADAPTIVE_SPECULATION: String(speculation.adaptive),
    MIMO_WORKER_TENSOR_PARALLEL: String(tensorParallel),
    MIMO_WORKER_DRAIN_GRACE: `${terminationGraceSeconds - 5}s`,
    MIMO_WORKER_EXECUTION_PROVIDER: executionProviderOf(resources),
    MIMO_WORKER_THREADS: String(Math.min(threadsMax, Math.max(1, Math.floor(amountOf(resources.cpu))))),
    ...(resources.kvCache === undefined
      ? {}
      : { MIMO_WORKER_KV_BYTES: String(Math.floor(amountOf(resources.kvCache))) }),
  };
}

/** Where a rank listens, and where its group's other ranks do. */
function networkVariables(
  { spec, metadata }: ModelService,
  identity: GroupIdentity,
  rank: number,
): Variables {
  const spread = spec.placement === 'spread';
  const offset = portOffset(spec, rank);
  const peers = Array.from({ length: spec.tensorParallel }, (_, peer) => {
    const host = spread
      ? `${podName(identity.group, peer)}.${rankServiceName(metadata.name)}.${metadata.namespace}.svc`
      : '127.0.0.1';
    return `${host}:${peerPort + portOffset(spec, peer)}`;
  });
  return {
    MIMO_WORKER_LISTEN: `0.0.0.0:${workerPort + offset}`,
    MIMO_WORKER_ADVERTISE: `$(POD_IP):${workerPort}`,
    ...(rank === 0 ? { MIMO_WORKER_METRICS_LISTEN: `0.0.0.0:${metricsPort}` } : {}),
    ...(spec.tensorParallel === 1
      ? {}
      : {
          MIMO_WORKER_PEERS: peers.join(','),
          MIMO_WORKER_PEER_LISTEN: `${spread ? '0.0.0.0' : '127.0.0.1'}:${peerPort + offset}`,
        }),
  };
}

function checkpointDirectory({ model }: ModelServiceSpec): string {
  const { hub, volumeClaim } = model.source;
  if (hub !== undefined) {
    return `/cache/checkpoints/${hub.repository}/${hub.revision}`;
  }
  return volumeClaim === undefined ? '/checkpoint' : `/checkpoint/${volumeClaim.path}`;
}
