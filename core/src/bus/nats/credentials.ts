// A client's credentials for a NATS server that requires them: from the servers' URLs, or from a file that is read
// again for each connection.

import { readFileSync } from 'node:fs';

import {
  credsAuthenticator,
  tokenAuthenticator,
  usernamePasswordAuthenticator,
  type Authenticator,
} from '@nats-io/transport-node';

import { ClusterError } from '../../process/errors.ts';

/** A server's URL without its credentials, and those: a user and password, or a token, or empty. */
export function splitServer(server: string): { readonly address: string; readonly credentials: string } {
  const [, scheme = '', credentials = '', host = ''] = /^(\w+:\/\/)?(?:([^@/]*)@)?(.*)$/.exec(server) ?? [];
  return {
    address: `${scheme}${host}`,
    credentials: credentials.split(':').map(decodeURIComponent).join(':'),
  };
}

/**
 * Reads the file for each connection; if that fails, the last credentials are used again. Throws `invalid_argument`
 * if it cannot be read at first.
 */
export function authenticatorFromFile(path: string): Authenticator {
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

/** What `nsc` writes for a user (.creds), `user:password`, or a token. */
export function parseCredentials(text: string): Authenticator {
  if (text.includes('-----BEGIN NATS USER JWT-----')) {
    return credsAuthenticator(Buffer.from(text));
  }
  const line = text.trim();
  const colon = line.indexOf(':');
  return colon === -1
    ? tokenAuthenticator(line)
    : usernamePasswordAuthenticator(line.slice(0, colon), line.slice(colon + 1));
}
