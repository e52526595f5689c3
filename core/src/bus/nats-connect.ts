// Connecting to NATS as every process of the cluster does it: in the background, again and again, for ever. Owns the
// manners of a connection and what it says of itself; what it is used for, and what is told while it is away, is the
// caller's business.

import { readFileSync } from 'node:fs';

import {
  connect,
  credsAuthenticator,
  tokenAuthenticator,
  usernamePasswordAuthenticator,
  type Authenticator,
  type NatsConnection,
  type ReconnectToServerHandler,
} from '@nats-io/transport-node';

import { ClusterError } from '../process/errors.ts';

/** Where the servers are, and what they are told of this client. */
export interface NatsServers {
  /** `nats://host:port` or `host:port`; with `user:password@` or `token@` before the host where the servers ask for it. */
  readonly servers: readonly string[];
  /** Shown by the servers' own tools. */
  readonly clientName: string;
  /**
   * A file instead: what `nsc` writes for a user (.creds), or one line with `user:password` or a token. Read anew for each
   * connection, so that it may be changed while the process runs.
   */
  readonly credentialsFile?: string;
}

/**
 * Resolves with the first connection, whenever that is; from then on it comes back by itself, also after the servers
 * refused its credentials. Throws `invalid_argument` at once where the credentials file cannot be read. Close it.
 */
export function connectNats({
  servers,
  clientName,
  credentialsFile = '',
}: NatsServers): Promise<NatsConnection> {
  const parts = servers.map(splitServer);
  const inUrl = parts.find(({ credentials }) => credentials !== '')?.credentials;
  let authenticator: Authenticator | undefined;
  if (credentialsFile !== '') {
    authenticator = authenticatorOf(credentialsFile);
  } else if (inUrl !== undefined) {
    authenticator = parseCredentials(inUrl);
  }
  return connect({
    servers: parts.map(({ address }) => address),
    name: clientName,
    waitOnFirstConnect: true,
    maxReconnectAttempts: -1,
    // The client would wait by the wall clock: set back by five minutes, it would not dial for five minutes.
    reconnectDelayHandler: () => Number.NEGATIVE_INFINITY,
    reconnectToServer: dialPause(parts.length),
    // A server that stopped answering is noticed within 15 s, where the default takes minutes.
    pingInterval: 5_000,
    maxPingOut: 2,
    // Refused twice, the client would give up; the credentials may be on their way, here or at the server.
    ignoreAuthErrorAbort: true,
    ...(authenticator === undefined ? {} : { authenticator }),
  });
}

/** Which server is next is the client's choice; each is dialled again no sooner than in 250 to 500 ms. */
function dialPause(servers: number): ReconnectToServerHandler {
  let nextMs = 0;
  return ([server]) => {
    const nowMs = performance.now();
    const delay = Math.max(0, nextMs - nowMs);
    nextMs = nowMs + delay + (250 + 250 * Math.random()) / servers;
    return server === undefined ? null : { server, delay };
  };
}

function splitServer(server: string): { readonly address: string; readonly credentials: string } {
  const [, scheme = '', credentials = '', host = ''] = /^(\w+:\/\/)?(?:([^@/]*)@)?(.*)$/.exec(server) ?? [];
  return {
    address: `${scheme}${host}`,
    credentials: credentials.split(':').map(decodeURIComponent).join(':'),
  };
}

/** Asks the file at each connection; one that cannot be used at that moment leaves what was used last. */
function authenticatorOf(path: string): Authenticator {
  const read = (): Authenticator => {
    const authenticator = parseCredentials(readFileSync(path, 'utf8'));
    // A .creds file is only parsed when it is asked.
    authenticator();
    return authenticator;
  };
  let last: Authenticator;
  try {
    last = read();
  } catch (error) {
    throw new ClusterError('invalid_argument', `the NATS credentials file ${path} cannot be read`, {
      cause: error,
    });
  }
  return (nonce) => {
    try {
      last = read();
    } catch {
      // Between two versions of a mounted Secret.
    }
    return last(nonce);
  };
}

function parseCredentials(text: string): Authenticator {
  if (text.includes('-----BEGIN NATS USER JWT-----')) {
    return credsAuthenticator(Buffer.from(text));
  }
  const line = text.trim();
  const colon = line.indexOf(':');
  return colon === -1
    ? tokenAuthenticator(line)
    : usernamePasswordAuthenticator(line.slice(0, colon), line.slice(colon + 1));
}
