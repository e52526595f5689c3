// Certificates of a test cluster: an authority of its own, and leaves for servers and clients, in memory as PEM.
// Elliptic keys, since they are made in a millisecond. Knows no component, no file and no address.

// oxlint-disable-next-line import/no-unassigned-import -- @peculiar/x509 needs this polyfill first
import 'reflect-metadata';
import { webcrypto } from 'node:crypto';

import * as x509 from '@peculiar/x509';

const lifetimeMs = 30 * 24 * 3_600_000;
/** A clock that is a little behind must not refuse a certificate made just now. */
const clockSkewMs = 3_600_000;
const keyAlgorithm = { name: 'ECDSA', namedCurve: 'P-256' } as const;
const signingAlgorithm = { name: 'ECDSA', hash: 'SHA-256' } as const;

/** A certificate with its private key, both PEM. */
export interface KeyPair {
  readonly certificate: string;
  readonly key: string;
}

/** Who a leaf is, as Kubernetes reads it: user name and groups of a client, and the names that a server answers to. */
interface LeafOptions {
  readonly commonName: string;
  readonly organizations?: readonly string[];
  /** Without names the leaf is a client's; with them it is a server's too. */
  readonly dnsNames?: readonly string[];
  readonly addresses?: readonly string[];
}

/** Signs leaves. */
export interface Authority {
  /** PEM, for those who trust it. */
  readonly certificate: string;
  /** PEM, for the controller-manager, which signs as well. */
  readonly key: string;
  issue(options: LeafOptions): Promise<KeyPair>;
}

async function createKeys(): Promise<webcrypto.CryptoKeyPair> {
  return webcrypto.subtle.generateKey(keyAlgorithm, true, ['sign', 'verify']);
}

async function privateKeyPem(keys: webcrypto.CryptoKeyPair): Promise<string> {
  const der = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
  const lines = der.toString('base64').match(/.{1,64}/g) ?? [];
  return `-----BEGIN PRIVATE KEY-----\n${lines.join('\n')}\n-----END PRIVATE KEY-----\n`;
}

function validity(): { notBefore: Date; notAfter: Date } {
  return { notBefore: new Date(Date.now() - clockSkewMs), notAfter: new Date(Date.now() + lifetimeMs) };
}

/** Makes an authority, or one below it would trust nobody else's: each call gives an independent root. */
export async function createAuthority(commonName: string): Promise<Authority> {
  const authorityKeys = await createKeys();
  const subject = [{ CN: [commonName] }];
  const authority = await x509.X509CertificateGenerator.createSelfSigned({
    name: subject,
    keys: authorityKeys,
    signingAlgorithm,
    ...validity(),
    extensions: [
      new x509.BasicConstraintsExtension(true, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.digitalSignature, true),
      await x509.SubjectKeyIdentifierExtension.create(authorityKeys.publicKey),
    ],
  });
  return {
    certificate: `${authority.toString('pem')}\n`,
    key: await privateKeyPem(authorityKeys),
    issue: async ({ commonName: leafName, organizations = [], dnsNames = [], addresses = [] }) => {
      const keys = await createKeys();
      const names = [
        ...dnsNames.map((value) => ({ type: 'dns', value }) as const),
        ...addresses.map((value) => ({ type: 'ip', value }) as const),
      ];
      const isServer = names.length > 0;
      const leaf = await x509.X509CertificateGenerator.create({
        subject: [...organizations.map((name) => ({ O: [name] })), { CN: [leafName] }],
        issuer: authority.subject,
        publicKey: keys.publicKey,
        signingKey: authorityKeys.privateKey,
        signingAlgorithm,
        ...validity(),
        extensions: [
          new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
          new x509.ExtendedKeyUsageExtension([
            x509.ExtendedKeyUsage.clientAuth,
            ...(isServer ? [x509.ExtendedKeyUsage.serverAuth] : []),
          ]),
          ...(isServer ? [new x509.SubjectAlternativeNameExtension(names)] : []),
        ],
      });
      return { certificate: `${leaf.toString('pem')}\n`, key: await privateKeyPem(keys) };
    },
  };
}
