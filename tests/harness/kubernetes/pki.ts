// The certificates of a cluster of boxes, as the files that its components read, and kubeconfigs that hold them. Owns
// the directory; the authority is certificates.ts'.

import { generateKeyPairSync } from 'node:crypto';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { createAuthority } from './certificates.ts';
import { formatKubeconfig } from './control-plane.ts';

/** Paths of a certificate and its private key. */
export interface PairFiles {
  readonly certificateFile: string;
  readonly keyFile: string;
}

/** Issues for one cluster into its directory. */
export interface Pki extends PairFiles {
  /** Of service account tokens: the private key signs, the public one verifies. */
  readonly serviceAccountKeyFile: string;
  readonly serviceAccountPublicKeyFile: string;
  issueClient(name: string, subject: { readonly user: string; readonly group?: string }): Promise<PairFiles>;
  issueServer(name: string, answersTo: ServerNames): Promise<PairFiles>;
  /** A kubeconfig for a client's pair, with everything inside it; gives its path. */
  writeKubeconfig(name: string, server: string, client: PairFiles): Promise<string>;
}

interface ServerNames {
  /** Its own name as a user; default: that of the files. */
  readonly user?: string;
  readonly dnsNames: readonly string[];
  readonly addresses: readonly string[];
}

export async function createPki(directory: string): Promise<Pki> {
  await mkdir(directory, { recursive: true });
  const write = async (name: string, text: string): Promise<string> => {
    const path = join(directory, name);
    await writeFile(path, text, { mode: 0o600 });
    return path;
  };
  const writePair = async (name: string, pair: { certificate: string; key: string }): Promise<PairFiles> => ({
    certificateFile: await write(`${name}.crt`, pair.certificate),
    keyFile: await write(`${name}.key`, pair.key),
  });
  const authority = await createAuthority('mimo-test');
  const accounts = generateKeyPairSync('rsa', {
    modulusLength: 2048,
    publicKeyEncoding: { type: 'spki', format: 'pem' },
    privateKeyEncoding: { type: 'pkcs8', format: 'pem' },
  });
  return {
    ...(await writePair('ca', authority)),
    serviceAccountKeyFile: await write('accounts.key', accounts.privateKey),
    serviceAccountPublicKeyFile: await write('accounts.pub', accounts.publicKey),
    issueClient: async (name, { user, group }) =>
      writePair(
        name,
        await authority.issue({ commonName: user, organizations: group === undefined ? [] : [group] }),
      ),
    issueServer: async (name, { user = name, dnsNames, addresses }) =>
      writePair(name, await authority.issue({ commonName: user, dnsNames, addresses })),
    writeKubeconfig: async (name, server, client) => {
      const pair = {
        certificate: await readFile(client.certificateFile, 'utf8'),
        key: await readFile(client.keyFile, 'utf8'),
      };
      return write(`${name}.kubeconfig`, formatKubeconfig(server, authority.certificate, pair));
    },
  };
}
