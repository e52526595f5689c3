// Connecting to NATS, the same way in every process: in the background, with retries forever. Owns the connection's
// conventions and options; its use, and what happens during a disconnection, is up to the caller.

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

/** The servers' addresses, and how this client introduces itself. */
export interface NatsServers {
  /** `nats://host:port` or `host:port`; with `user:password@` or `token@` before the host if the servers require it. */
  readonly servers: readonly string[];
  /** The client's name in the servers' own tools. */
  readonly clientName: string;
  /**
   * Instead, a file: a .creds file from `nsc`, or one line with `user:password` or a token. Read again for each
   * connection, so it may change while the process runs.
   */
  readonly credentialsFile?: string;
}

/**
 * Resolves with the first connection, however long that takes. From then on the client reconnects by itself, also
 * after the servers rejected its credentials. Throws `invalid_argument` at once if the credentials file cannot be
 * read. Close it.
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
    // The client would wait by the wall clock: after it is set back by five minutes, it would not dial for five
    // minutes.
    reconnectDelayHandler: () => Number.NEGATIVE_INFINITY,
    reconnectToServer: dialPause(parts.length),
    // A server that stopped answering is noticed within 15 s, where the default takes minutes.
    pingInterval: 5_000,
    maxPingOut: 2,
    // By default the client gives up after two rejections; but new credentials may be on their way, here or at the
    // server.
    ignoreAuthErrorAbort: true,
    ...(authenticator === undefined ? {} : { authenticator }),
  });
}

/** The client chooses the next server; it dials the same server again after 250 to 500 ms at the earliest. */
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

/** Reads the file for each connection; if that fails, the last credentials are used again. */
function authenticatorOf(path: string): Authenticator {
  const read = (): Authenticator => {
    const authenticator = parseCredentials(readFileSync(path, 'utf8'));
    // A .creds file is parsed only on use.
    authenticator();
    return authenticator;
  };
  let last: Authenticator;
  try {
    last = read();
  } catch (error) {
    throw new ClusterError('invalid_argument', `cannot read the NATS credentials file ${path}`, {
      cause: error,
    });
  }
  return (nonce) => {
    try {
      last = read();
    } catch {
      // Kubernetes is replacing the mounted Secret.
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
