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
   * Models beside the catalogue's, `name=directory` between commas or `{"name": "directory"}`; the directory holds
   * config.json and the tokenizer's files.
   */
  models: mapSetting('MIMO_GATEWAY_MODELS', ''),
  /** Where the files of the catalogue's models are kept while they are served; empty: the system's temporary directory. */
  modelsDirectory: textSetting('MIMO_GATEWAY_MODELS_DIRECTORY', ''),
  /** Comma-separated. Empty: the queue is kept in memory, which is not durable, and `workers` must be given. */
  natsUrls: natsServersSetting('MIMO_GATEWAY_NATS', ''),
  /** A .creds file, or one line with `user:password` or a token; read anew for each connection. */
  natsCredentialsFile: textSetting('MIMO_GATEWAY_NATS_CREDENTIALS_FILE', ''),
  /** 1 suits one server; production runs three. */
  natsReplicas: integerSetting('MIMO_GATEWAY_NATS_REPLICAS', { min: 1, max: 5 }, 1),
  /** A record that nobody deleted goes after this; longer than any request lives. */
  recordMaxAgeMs: durationSetting('MIMO_GATEWAY_RECORD_MAX_AGE', '24h'),
  /**
   * What the stream of records may hold: some 200,000 waiting prompts of 2 kB. On disk it may take twice that, since blocks
   * of which half is deleted are not rewritten; keep it below 40 % of the volume. Requests are refused from 90 % of it on.
   * The model catalogue may hold an eighth of it, beside it.
   */
  queueMaxBytes: sizeSetting('MIMO_GATEWAY_QUEUE_MAX_BYTES', '1Gi'),
  /** The server's memory holds a few hundred bytes for each. */
  queueMaxRequests: integerSetting('MIMO_GATEWAY_QUEUE_MAX_REQUESTS', { min: 1, max: 10_000_000 }, 200_000),
  /**
   * What an ended request leaves in an encrypted store is removed at most twice this long after its end, and the server's
   * `sync_interval` more. Live records are written again at this pace, and the dispatcher of a model that has requests fills up
   * the store's file (8 MiB). `0s`: never, as for a store in plain text, where each deletion overwrites.
   */
  eraseAfterMs: durationSetting('MIMO_GATEWAY_ERASE_AFTER', '60s'),
  /** Addresses of group leaders that are asked for their heartbeats directly, for want of NATS. */
  workers: listSetting('MIMO_GATEWAY_WORKERS', ''),
  /** JSON file with API keys, read again when it changes; empty: everybody is let in as tenant `anonymous`. */
  keysFile: textSetting('MIMO_GATEWAY_KEYS_FILE', ''),
  /** `true`: nobody is let in until the file comes, as where a controller has yet to write the mounted Secret. */
  keysFileOptional: booleanSetting('MIMO_GATEWAY_KEYS_FILE_OPTIONAL', false),
  /** How long a request waits for a group that takes it, where its own deadline is not sooner; covers a cold start. */
  maxWaitMs: durationSetting('MIMO_GATEWAY_MAX_WAIT', '10m'),
  /** A client that takes nothing of its stream for this long loses it; proxies use the same. */
  clientStallMs: durationSetting('MIMO_GATEWAY_CLIENT_STALL', '60s'),
  /** How long a stopping gateway lets its streams run; below Kubernetes' own 30 s. */
  graceMs: durationSetting('MIMO_GATEWAY_GRACE', '25s'),
  /** One incoming message; a prompt of a million token ids is about 3 MB. */
  maxReceiveBytes: sizeSetting('MIMO_GATEWAY_MAX_RECEIVE', '16Mi'),
  /** Processes that read a model's prompts: one is started with the model, the others while there is work for them. */
  promptReaders: integerSetting('MIMO_GATEWAY_PROMPT_READERS', { min: 1, max: 64 }, 2),
  /** Ends a chat template or tokenizer that goes on for longer over one prompt; a megabyte of text takes a second. */
  promptTimeoutMs: durationSetting('MIMO_GATEWAY_PROMPT_TIMEOUT', '10s'),
  /** Text of one prompt, more than any context holds. */
  promptMaxBytes: sizeSetting('MIMO_GATEWAY_PROMPT_MAX', '1Mi'),
  /** Each costs about 30 kB before it has asked anything. */
  maxConnections: integerSetting('MIMO_GATEWAY_MAX_CONNECTIONS', { min: 1, max: 1_000_000 }, 10_000),
  /** Of one address; high, since it may be a proxy or a NAT. Those that made no call with a valid key make room first. */
  maxConnectionsPerPeer: integerSetting(
    'MIMO_GATEWAY_MAX_CONNECTIONS_PER_PEER',
    { min: 1, max: 1_000_000 },
    1_000,
  ),
  /** Open at once; clients queue the others. A proxy may bring all its users over one connection. */
  maxStreamsPerConnection: integerSetting(
    'MIMO_GATEWAY_MAX_STREAMS_PER_CONNECTION',
    { min: 1, max: 1_000_000 },
    4_096,
  ),
  /** A key, a deadline and some tracing are below 1 kB; HTTP servers commonly take 8 to 16. */
  maxHeaderBytes: sizeSetting('MIMO_GATEWAY_MAX_HEADERS', '16Ki'),
  /** Requests that are arriving or not answered yet, over all calls; beyond it the largest ends. Eight of the largest fit. */
  maxUnansweredBytes: sizeSetting('MIMO_GATEWAY_MAX_UNANSWERED', '128Mi'),
  /** For a whole request to arrive: 16 MiB at 5 Mbit/s. */
  bodyTimeoutMs: durationSetting('MIMO_GATEWAY_BODY_TIMEOUT', '30s'),
  /** Beyond this many requests in this gateway, new ones are refused: each holds a stream and its prompt in memory. */
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
              'MIMO_GATEWAY_MODELS must name at least one model where there is no catalogue, for want of MIMO_GATEWAY_NATS',
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
