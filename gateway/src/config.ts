// The gateway's settings: one table with the defaults and their reasons, and the checks across fields. Its input is the
// environment as main.ts hands it over; nothing else reads it.

import {
  addressSetting,
  booleanSetting,
  choiceSetting,
  durationSetting,
  integerSetting,
  listSetting,
  mapSetting,
  natsServersSetting,
  parseConfig,
  sizeSetting,
  textSetting,
  type ConfigOf,
  type Environment,
} from '@mimo/core/process/config';
import { logLevels } from '@mimo/core/process/log';

/** The gateway's settings by their variables. */
export const gatewaySettings = {
  /** Every interface: a pod is reached from outside itself. */
  listenAddress: addressSetting('MIMO_GATEWAY_LISTEN', '0.0.0.0:50051'),
  /** Where Prometheus reads; empty serves no page. */
  metricsListenAddress: addressSetting('MIMO_GATEWAY_METRICS_LISTEN', ''),
  logLevel: choiceSetting('MIMO_GATEWAY_LOG_LEVEL', logLevels, 'info'),
  /**
   * Models in addition to the catalogue's, `name=directory` between commas or `{"name": "directory"}`; the directory
   * holds config.json and the tokenizer's files.
   */
  models: mapSetting('MIMO_GATEWAY_MODELS', ''),
  /**
   * Where the files of the catalogue's models are kept while they are served; empty: the system's temporary
   * directory.
   */
  modelsDirectory: textSetting('MIMO_GATEWAY_MODELS_DIRECTORY', ''),
  /** Comma-separated. Empty: the queue is kept in memory, which is not durable, and `workers` must be given. */
  natsUrls: natsServersSetting('MIMO_GATEWAY_NATS', ''),
  /** A .creds file, or one line with `user:password` or a token; read again for each connection. */
  natsCredentialsFile: textSetting('MIMO_GATEWAY_NATS_CREDENTIALS_FILE', ''),
  /** 1 suits one server; production runs three. */
  natsReplicas: integerSetting('MIMO_GATEWAY_NATS_REPLICAS', { min: 1, max: 5 }, 1),
  /** Leftover records expire after this; longer than any request lives. */
  recordMaxAgeMs: durationSetting('MIMO_GATEWAY_RECORD_MAX_AGE', '24h'),
  /**
   * Size limit of the stream of records: some 200,000 waiting prompts of 2 kB. It may take twice that on disk, since
   * blocks are rewritten only when more than half of them is deleted; keep it below 40 % of the volume. Requests are
   * rejected from 90 % of it on. The model catalogue may take another eighth of it.
   */
  queueMaxBytes: sizeSetting('MIMO_GATEWAY_QUEUE_MAX_BYTES', '1Gi'),
  /** The server's memory holds a few hundred bytes for each. */
  queueMaxRequests: integerSetting('MIMO_GATEWAY_QUEUE_MAX_REQUESTS', { min: 1, max: 10_000_000 }, 200_000),
  /**
   * What an ended request leaves in an encrypted store is removed at most twice this long after its end, and the
   * server's `sync_interval` more. Live records are written again at this pace, and the dispatcher of a model that
   * has requests fills up the store's file (8 MiB). `0s`: never, as for a store in plain text, where each deletion
   * overwrites.
   */
  eraseAfterMs: durationSetting('MIMO_GATEWAY_ERASE_AFTER', '60s'),
  /** Without NATS only: addresses of group leaders, which this gateway polls for their heartbeats. */
  workers: listSetting('MIMO_GATEWAY_WORKERS', ''),
  /** JSON file with API keys, reloaded when it changes; empty: every caller is accepted as tenant `anonymous`. */
  keysFile: textSetting('MIMO_GATEWAY_KEYS_FILE', ''),
  /**
   * `true`: the file may appear later, and until then every caller is rejected. For a mounted Secret that a
   * controller has yet to write.
   */
  keysFileOptional: booleanSetting('MIMO_GATEWAY_KEYS_FILE_OPTIONAL', false),
  /** How long a request waits for a group, unless its own deadline is sooner; covers a cold start. */
  maxWaitMs: durationSetting('MIMO_GATEWAY_MAX_WAIT', '10m'),
  /**
   * A stream whose client reads nothing for this long is ended. A client on a busy machine may stand still for more
   * than a minute, and waiting costs little: its stream holds no slot, and gives way in a full gateway.
   */
  clientStallMs: durationSetting('MIMO_GATEWAY_CLIENT_STALL', '5m'),
  /** How long a stopping gateway lets its streams finish; below Kubernetes' own 30 s. */
  graceMs: durationSetting('MIMO_GATEWAY_GRACE', '25s'),
  /** One incoming message; a prompt of a million token ids is about 3 MB. */
  maxReceiveBytes: sizeSetting('MIMO_GATEWAY_MAX_RECEIVE', '16Mi'),
  /** Processes that tokenise a model's prompts: one starts with the model, the others on demand. */
  promptReaders: integerSetting('MIMO_GATEWAY_PROMPT_READERS', { min: 1, max: 64 }, 2),
  /** Time limit of a chat template and tokenizer for one prompt; a megabyte of text takes a second. */
  promptTimeoutMs: durationSetting('MIMO_GATEWAY_PROMPT_TIMEOUT', '10s'),
  /** Text of one prompt, more than any context holds. */
  promptMaxBytes: sizeSetting('MIMO_GATEWAY_PROMPT_MAX', '1Mi'),
  /** Each costs about 30 kB before its first call. */
  maxConnections: integerSetting('MIMO_GATEWAY_MAX_CONNECTIONS', { min: 1, max: 1_000_000 }, 10_000),
  /**
   * Per address; high, since it may be a proxy or a NAT. Connections without a call with a valid key are closed
   * first.
   */
  maxConnectionsPerPeer: integerSetting(
    'MIMO_GATEWAY_MAX_CONNECTIONS_PER_PEER',
    { min: 1, max: 1_000_000 },
    1_000,
  ),
  /** Open at once; clients queue further ones. A proxy may carry all its users over one connection. */
  maxStreamsPerConnection: integerSetting(
    'MIMO_GATEWAY_MAX_STREAMS_PER_CONNECTION',
    { min: 1, max: 1_000_000 },
    4_096,
  ),
  /** A key, a deadline and some tracing are below 1 kB; HTTP servers commonly take 8 to 16. */
  maxHeaderBytes: sizeSetting('MIMO_GATEWAY_MAX_HEADERS', '16Ki'),
  /**
   * Size of all requests that are arriving or not answered yet; beyond it the largest one fails. Eight of the largest
   * fit.
   */
  maxUnansweredBytes: sizeSetting('MIMO_GATEWAY_MAX_UNANSWERED', '128Mi'),
  /** For a whole request to arrive: 16 MiB at 5 Mbit/s. */
  bodyTimeoutMs: durationSetting('MIMO_GATEWAY_BODY_TIMEOUT', '30s'),
  /** Limit of requests in this gateway; further ones are rejected. Each keeps a stream and its prompt in memory. */
  maxRequests: integerSetting('MIMO_GATEWAY_MAX_REQUESTS', { min: 1, max: 1_000_000 }, 20_000),
};

export type GatewayConfig = ConfigOf<typeof gatewaySettings>;

/** Reads the environment; fails with `invalid_argument` listing every problem. */
export function parseGatewayConfig(env: Environment): GatewayConfig {
  return parseConfig(
    {
      prefix: 'MIMO_GATEWAY_',
      settings: gatewaySettings,
      check: (config) => [
        ...(config.models.size === 0 && config.natsUrls.length === 0
          ? [
              'MIMO_GATEWAY_MODELS must name at least one model, because without MIMO_GATEWAY_NATS there is no catalogue',
            ]
          : []),
        ...(config.maxUnansweredBytes < config.maxReceiveBytes
          ? [
              `MIMO_GATEWAY_MAX_UNANSWERED must be at least MIMO_GATEWAY_MAX_RECEIVE, ${config.maxReceiveBytes} bytes, not ${config.maxUnansweredBytes}`,
            ]
          : []),
        ...(config.natsUrls.length === 0 && config.workers.length === 0
          ? ['MIMO_GATEWAY_NATS is empty, so MIMO_GATEWAY_WORKERS must name at least one worker']
          : []),
        ...(config.natsUrls.length > 0 && config.workers.length > 0
          ? ['MIMO_GATEWAY_WORKERS is for a queue in memory: with MIMO_GATEWAY_NATS it must be empty']
          : []),
      ],
    },
    env,
  );
}
