import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterAll, describe, expect, it } from 'vitest';

import { loadKubeConfig } from './kube-config.ts';

const directory = mkdtempSync(join(tmpdir(), 'kube-config-'));
afterAll(() => rmSync(directory, { recursive: true }));

const base64 = (text: string): string => Buffer.from(text).toString('base64');

/** Writes a kubeconfig of one cluster and one user, with what is given changed. */
function write(
  cluster: object,
  user: object,
  context: object = { cluster: 'c', user: 'u', namespace: 'models' },
): string {
  const file = join(directory, `${Math.random()}.kubeconfig`);
  const content = {
    apiVersion: 'v1',
    kind: 'Config',
    'current-context': 'x',
    contexts: [{ name: 'x', context }],
    clusters: [{ name: 'c', cluster: { server: 'https://10.0.0.1:6443/', ...cluster } }],
    users: [{ name: 'u', user }],
  };
  writeFileSync(file, JSON.stringify(content));
  return file;
}

/** What a plugin prints. */
function answerOf(token: string, expiresUnixMs: number): string {
  return JSON.stringify({ status: { token, expirationTimestamp: new Date(expiresUnixMs).toISOString() } });
}

describe('a kubeconfig file', () => {
  it('gives what stands in it, data before paths, and paths relative to it', async () => {
    writeFileSync(join(directory, 'client.crt'), 'certificate');
    const cluster = {
      'certificate-authority-data': base64('authority'),
      'certificate-authority': 'absent.crt',
      'tls-server-name': 'kubernetes',
    };
    const user = { 'client-certificate': 'client.crt', 'client-key-data': base64('key') };
    const config = loadKubeConfig(write(cluster, user));
    expect(config).toMatchObject({ url: 'https://10.0.0.1:6443', namespace: 'models' });
    expect(await config.credentials()).toEqual({
      ca: 'authority',
      cert: 'certificate',
      key: 'key',
      servername: 'kubernetes',
    });
  });

  it('reads files again each time', async () => {
    const config = loadKubeConfig(write({ 'insecure-skip-tls-verify': true }, { tokenFile: 'token' }));
    for (const token of ['one', 'two']) {
      writeFileSync(join(directory, 'token'), `${token}\n`);
      expect(await config.credentials()).toEqual({ token, rejectUnauthorized: false });
    }
  });

  it('runs a plugin again only once its answer has expired', async () => {
    const answer = join(directory, 'answer');
    const exec = { apiVersion: 'client.authentication.k8s.io/v1', command: 'cat', args: [answer] };
    const config = loadKubeConfig(write({}, { exec }));
    writeFileSync(answer, answerOf('expired', Date.now() - 1000));
    expect(await config.credentials()).toEqual({ token: 'expired' });
    writeFileSync(answer, answerOf('valid', Date.now() + 3_600_000));
    expect(await config.credentials()).toEqual({ token: 'valid' });
    writeFileSync(answer, 'no JSON');
    expect(await config.credentials()).toEqual({ token: 'valid' });
    config.refused();
    await expect(config.credentials()).rejects.toThrow('JSON');
  });

  it.each([
    ['a server that is no URL', { server: '10.0.0.1' }, {}, undefined, 'server'],
    ['a proxy', { 'proxy-url': 'http://proxy' }, {}, undefined, 'proxy-url'],
    [
      'a provider that needs a library',
      {},
      { 'auth-provider': { name: 'oidc' } },
      undefined,
      'auth-provider',
    ],
    ['a context without its cluster', {}, {}, { cluster: 'other', user: 'u' }, 'no cluster is named other'],
    ['a context without its user', {}, {}, { cluster: 'c', user: 'other' }, 'no user is named other'],
  ])('is refused with %s, naming it', (_, cluster, user, context, words) => {
    expect(() => loadKubeConfig(write(cluster, user, context))).toThrow(words);
  });

  it('is refused where it is missing or no YAML, naming the file', () => {
    expect(() => loadKubeConfig(join(directory, 'absent'))).toThrow('absent');
    const file = join(directory, 'broken');
    writeFileSync(file, '{');
    expect(() => loadKubeConfig(file)).toThrow(file);
  });
});

describe('a pod', () => {
  it('finds its cluster by its environment, over IPv6 too', async () => {
    for (const [name, text] of Object.entries({
      'ca.crt': 'authority',
      token: 'secret\n',
      namespace: 'models\n',
    })) {
      writeFileSync(join(directory, name), text);
    }
    const env = { KUBERNETES_SERVICE_HOST: 'fd00::1', KUBERNETES_SERVICE_PORT: '443' };
    const config = loadKubeConfig(undefined, { env, directory });
    expect(config).toMatchObject({ url: 'https://[fd00::1]:443', namespace: 'models' });
    expect(await config.credentials()).toEqual({ ca: 'authority', token: 'secret' });
    expect(() => loadKubeConfig(undefined, { env: {}, directory })).toThrow('KUBERNETES_SERVICE_HOST');
  });

  it('is none without a service account', () => {
    expect(() => loadKubeConfig(undefined, { env: {}, directory: join(directory, 'absent') })).toThrow(
      'no pod',
    );
  });
});
