// The gateway's connections to the queue and to the model catalogue beside it, by the configuration: in NATS, or a bus
// in memory and no catalogue.

import type { ProcessParts } from '@mimo/core/process/run-process';
import type { Bus } from '@mimo/core/bus/bus';
import { createMemoryBus } from '@mimo/core/bus/memory/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';

import type { GatewayConfig } from './config.ts';

/**
 * The catalogue's size limit, as a share of the queue's. In the chart the queue has 40 % of the volume and may use
 * twice that on disk; the catalogue has 5 % and may use 10 %.
 */
const catalogShare = 1 / 8;
/** Two versions of a model of MiMo's size: the one being replaced and its replacement. */
const minCatalogBytes = 32 * 2 ** 20;

/** Opens the bus, which connects in the background and reconnects. The lifecycle closes it. */
export function openBus({ config, log, lifecycle }: ProcessParts<GatewayConfig>, gatewayId: string): Bus {
  if (config.natsUrls.length === 0) {
    log.warn(
      'no NATS server is configured: the queue is in memory, and requests do not survive this process',
    );
    return lifecycle.opened('bus', createMemoryBus());
  }
  const bus = createNatsBus({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `mimo-gateway ${gatewayId}`,
    replicas: config.natsReplicas,
    recordMaxAgeMs: config.recordMaxAgeMs,
    limits: { maxBytes: config.queueMaxBytes, maxRecords: config.queueMaxRequests },
    log,
  });
  return lifecycle.opened('bus', bus);
}

/**
 * Opens the catalogue beside the queue; undefined if the bus is in memory. It has a separate connection: a transfer of
 * model files may take seconds, and the queue counts as broken when its probes take two.
 */
export function openCatalog(
  { config, log, lifecycle }: ProcessParts<GatewayConfig>,
  gatewayId: string,
): ModelCatalog | undefined {
  if (config.natsUrls.length === 0) {
    return undefined;
  }
  const link = new NatsLink({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `mimo-gateway ${gatewayId} models`,
    log,
  });
  lifecycle.opened('link of the catalogue', link);
  return createModelCatalog(link, {
    replicas: config.natsReplicas,
    maxBytes: Math.max(minCatalogBytes, Math.floor(config.queueMaxBytes * catalogShare)),
    log,
  });
}
