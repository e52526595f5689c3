// The state of a cluster as files, to investigate a failure.

import { cp, mkdir, mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import type { RealCluster } from '../harness/kubernetes/cluster.ts';
import { namespace } from './installation.ts';

const commands: readonly (readonly [string, readonly string[]])[] = [
  ['all.txt', ['get', 'all,pvc,events', '-A', '-o', 'wide']],
  ['model-services.yaml', ['get', 'modelservices,tenants', '-n', namespace, '-o', 'yaml']],
  ['describe.txt', ['describe', 'modelservices,pods', '-n', namespace]],
  ['nodes.txt', ['describe', 'nodes']],
];

/** Writes what kubectl says, the logs of every pod, and those of the machines; gives the directory. */
export async function dumpState(cluster: RealCluster): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'mimo-e2e-failure-'));
  const save = async (file: string, args: readonly string[]): Promise<void> => {
    const text = await cluster.kubectl(...args).catch((error: unknown) => `failed: ${String(error)}\n`);
    await writeFile(join(directory, file), text);
  };
  for (const [file, args] of commands) {
    await save(file, args);
  }
  const names = await cluster.kubectl('get', 'pods', '-n', namespace, '-o', 'name').catch(() => '');
  for (const pod of names.split('\n').filter((name) => name !== '')) {
    const file = pod.replace('/', '-');
    await save(`${file}.log`, ['logs', '-n', namespace, pod, '--all-containers', '--prefix']);
    await save(`${file}.previous.log`, ['logs', '-n', namespace, pod, '--all-containers', '--prefix', '-p']);
  }
  for (const box of [cluster.controlPlaneBox, ...cluster.nodes.map((node) => node.box)]) {
    await mkdir(join(directory, box.name));
    await cp(join(box.directory, 'log'), join(directory, box.name), { recursive: true });
    // Containers that are gone have left their logs here.
    await cp(join(box.directory, 'var/log/pods'), join(directory, box.name, 'pods'), {
      recursive: true,
    }).catch(() => undefined);
  }
  return directory;
}
