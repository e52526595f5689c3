import { execFileSync } from 'node:child_process';
import { globSync, lstatSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { freePorts } from '../../cli/src/local/free-ports.ts';
import { ask, chatRequest, createClient } from '../harness/cluster.ts';
import {
  startContainer,
  unpackImage,
  type Container,
  type UnpackedImage,
} from '../harness/kubernetes/container.ts';
import { copiedPaths, findImages, type BuiltImage, type ImageName } from '../harness/kubernetes/images.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = join(import.meta.dirname, '../..');
/** The worker's CUDA image is optional: it brings 930 MB. */
const workers =
  process.env['MIMO_CUDA_IMAGE'] === undefined ? (['worker'] as const) : (['worker', 'worker-cuda'] as const);
const ours = ['gateway', 'controller', ...workers] as const;
const names = [...ours, 'nats'] as const;
/** Images are built within this; it takes six minutes on two busy cores with an empty cache. */
/**
 * Images are built here where the sources have changed: a busy machine takes as long as it takes, and says how far it
 * is.
 */
const noLimit = 0;
const gatewayMaxMegabytes = 250;

const unpacked: Partial<Record<ImageName, UnpackedImage>> = {};
let images: Readonly<Record<(typeof names)[number], BuiltImage>>;
beforeAll(async () => {
  images = await findImages(names);
  for (const name of names) {
    unpacked[name] = await unpackImage(images[name]);
  }
}, noLimit);
afterAll(async () => {
  for (const image of Object.values(unpacked)) {
    await image.close();
  }
});

function find(name: ImageName): UnpackedImage {
  const image = unpacked[name];
  if (image === undefined) {
    throw new Error(`image ${name} was not unpacked`);
  }
  return image;
}

/** By hand, because Node's own recursion goes through links and counts what they lead to twice. */
function bytesIn(path: string): number {
  const entry = lstatSync(path);
  if (entry.isDirectory()) {
    return readdirSync(path).reduce((sum, name) => sum + bytesIn(join(path, name)), 0);
  }
  return entry.isFile() ? entry.size : 0;
}

function megabytes(directory: string): number {
  return bytesIn(directory) / 1e6;
}

/** `name@version` of each package in a node_modules folder, but for our own. */
function installedPackages(directory: string): readonly string[] {
  return globSync('**/node_modules/{*,@*/*}/package.json', { cwd: directory })
    .map(
      (file) => JSON.parse(readFileSync(join(directory, file), 'utf8')) as { name: string; version: string },
    )
    .filter(({ name }) => !name.startsWith('@mimo/'))
    .map(({ name, version }) => `${name}@${version}`);
}

function readDockerfile(file: string): string {
  return readFileSync(join(root, 'deploy/images', file), 'utf8');
}

/** From the first stage on the Node image to the last line that copies out of one. */
function stagesOnNode(dockerfile: string): string | undefined {
  return /^FROM \$\{NODE_IMAGE\} AS runtime$[^]*^COPY --from=packages .*$/m.exec(dockerfile)?.[0];
}

describe('a Dockerfile', () => {
  it('is parsed for the files that it copies from its context', () => {
    expect(copiedPaths('FROM a\nCOPY b c/ d/\nCOPY --from=x /y /z\nRUN COPY\nCOPY e f\n')).toEqual([
      'b',
      'c/',
      'e',
    ]);
  });

  const dockerfiles = globSync('*/*Dockerfile', { cwd: join(root, 'deploy/images') });

  it.each(dockerfiles)('(%s) copies the manifest of every workspace', (file) => {
    const { workspaces } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
      workspaces: string[];
    };
    const paths = copiedPaths(readDockerfile(file));
    expect(paths).toEqual(expect.arrayContaining(workspaces.map((workspace) => `${workspace}/package.json`)));
  });

  it('for CUDA has the same stages as the one for CPUs', () => {
    const forCpus = stagesOnNode(readDockerfile('worker/Dockerfile'));
    expect(forCpus).toContain('install-packages.sh');
    expect(stagesOnNode(readDockerfile('worker/cuda.Dockerfile'))).toBe(forCpus);
  });
});

describe('an image', () => {
  it('has the size that README.md states, the gateway below its limit', () => {
    const readme = readFileSync(join(root, 'deploy/images/README.md'), 'utf8');
    expect(megabytes(find('gateway').directory)).toBeLessThan(gatewayMaxMegabytes);
    for (const name of ours) {
      const unpackedMegabytes = megabytes(find(name).directory);
      const archiveMegabytes = images[name].archiveBytes / 1e6;
      console.log(
        `${name}: ${unpackedMegabytes.toFixed(0)} MB, ${archiveMegabytes.toFixed(0)} MB compressed`,
      );
      const [, said] = new RegExp(`^\\| ${name} +\\| (\\d+) MB`, 'm').exec(readme) ?? [];
      expect(Math.abs(unpackedMegabytes - Number(said)) / unpackedMegabytes).toBeLessThan(0.1);
    }
  });

  it.each(ours)('of the %s holds Node and sources, no shell, no npm, no tests', (name) => {
    const { directory, config } = find(name);
    expect(config.user).toBe('10001:10001');
    expect(globSync('{,usr/,usr/local/}{bin,sbin}/*', { cwd: directory })).toEqual(['usr/local/bin/node']);
    expect(globSync('usr/local/lib/*', { cwd: directory })).toEqual([]);
    expect(globSync('app/{node_modules/**/*.{ts,map},*/src/**/*.test.ts}', { cwd: directory })).toEqual([]);
    expect(globSync('app/{gateway,worker,controller}/src/main.ts', { cwd: directory })).toEqual([
      join('app', name.replace('-cuda', ''), 'src/main.ts'),
    ]);
  });

  it.each(ours)('of the %s lists its installed packages', (name) => {
    const { directory, config } = find(name);
    const path = config.labels['dev.mimo-cluster.sbom'] ?? '';
    const { packages } = JSON.parse(readFileSync(join(directory, path), 'utf8')) as {
      packages: readonly { name: string; versionInfo: string }[];
    };
    const listed = packages.filter((entry) => !/^(@mimo\/|mimo-cluster$)/.test(entry.name));
    expect(listed.map((entry) => `${entry.name}@${entry.versionInfo}`).toSorted()).toEqual(
      installedPackages(join(directory, 'app')).toSorted(),
    );
  });

  it('shares the layer of Node with the others', async () => {
    const firstLayers = ours.map((name) => {
      const list = (file: string): string =>
        execFileSync('tar', ['--extract', '--to-stdout', `--file=${images[name].archive}`, file], {
          encoding: 'utf8',
        });
      const index = JSON.parse(list('index.json')) as { manifests: readonly { digest: string }[] };
      const digest = index.manifests[0]?.digest.replace(':', '/') ?? '';
      const manifest = JSON.parse(list(`blobs/${digest}`)) as { layers: readonly { digest: string }[] };
      return manifest.layers[0]?.digest;
    });
    expect(new Set(firstLayers).size).toBe(1);
  });
});

describe('the processes of the images', () => {
  const containers: Container[] = [];
  const start = async (...args: Parameters<typeof startContainer>): Promise<Container> => {
    const container = await startContainer(...args);
    containers.push(container);
    return container;
  };
  afterAll(async () => {
    for (const container of containers.toReversed()) {
      await container.close();
    }
  });

  it.each(workers)(
    '(%s) answer a request together, each with a read-only root and as user nobody',
    async (name) => {
      const [natsPort = 0, workerPort = 0, gatewayPort = 0] = await freePorts(3);
      const natsUrl = `nats://127.0.0.1:${natsPort}`;
      const directories = { '/models/mimo-demo': join(root, 'models/mimo-demo') };
      await start(find('nats'), {
        args: ['--jetstream', '--store_dir=/data', '--addr=127.0.0.1', `--port=${natsPort}`],
        writable: ['/data'],
      });
      const worker = await start(find(name), {
        env: {
          MIMO_WORKER_MODEL: 'mimo-demo',
          MIMO_WORKER_CHECKPOINT_DIRECTORY: '/models/mimo-demo',
          MIMO_WORKER_CACHE_DIRECTORY: '/cache',
          MIMO_WORKER_LISTEN: `127.0.0.1:${workerPort}`,
          MIMO_WORKER_NATS_URL: natsUrl,
        },
        directories,
        writable: ['/cache'],
      });
      const gateway = await start(find('gateway'), {
        env: {
          MIMO_GATEWAY_LISTEN: `127.0.0.1:${gatewayPort}`,
          MIMO_GATEWAY_MODELS: 'mimo-demo=/models/mimo-demo',
          MIMO_GATEWAY_NATS: natsUrl,
        },
        directories,
        writable: ['/tmp'],
      });
      const client = createClient(`127.0.0.1:${gatewayPort}`);
      try {
        // The gateway may still be starting; what it does not answer is asked again.
        let text = '';
        await waitFor(
          'an answer from the containers',
          async () => {
            text = (await ask(client, { request: chatRequest('Hello', { maxTokens: 8 }) })).text;
            return true;
          },
          120_000,
        );
        expect(text + (await gateway.log())).not.toBe('');
        expect(await worker.log()).not.toContain('error');
      } finally {
        client.close();
      }
      await gateway.child.stop(20_000);
      await worker.child.stop(20_000);
      expect(await gateway.child.exited).toEqual({ code: 0, signal: null });
      expect(await worker.child.exited).toEqual({ code: 0, signal: null });
    },
  );
});
