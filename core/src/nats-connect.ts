// Connecting to NATS as every process of the cluster does it: in the background, again and again, for ever. Owns the
// manners of a connection; what it is used for, and what is told while it is away, is the caller's business.

import { connect, type NatsConnection } from '@nats-io/transport-node';

/** Where the servers are, and the name that their own tools show for this client. */
export interface NatsServers {
  readonly servers: readonly string[];
  readonly clientName: string;
}

/** Resolves with the first connection, whenever that is; from then on it comes back by itself. Close it. */
export function connectNats({ servers, clientName }: NatsServers): Promise<NatsConnection> {
  return connect({
    servers: [...servers],
    name: clientName,
    waitOnFirstConnect: true,
    maxReconnectAttempts: -1,
    reconnectTimeWait: 250,
    reconnectJitter: 250,
    // A server that stopped answering is noticed within 15 s, where the default takes minutes.
    pingInterval: 5_000,
    maxPingOut: 2,
  });
}
