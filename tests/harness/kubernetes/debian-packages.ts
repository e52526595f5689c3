// The programs of a node that are not built here: Debian's packages, installed if missing. On any other machine it
// fails with instructions.

import { execFile } from 'node:child_process';
import { access } from 'node:fs/promises';
import { promisify } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';

/** Each package by a file that it brings. */
const packages: Readonly<Record<string, string>> = {
  containerd: '/usr/bin/containerd',
  runc: '/usr/sbin/runc',
  'containernetworking-plugins': '/usr/lib/cni/bridge',
  iptables: '/usr/sbin/iptables',
  nftables: '/usr/sbin/nft',
  conntrack: '/usr/sbin/conntrack',
  socat: '/usr/bin/socat',
  ebtables: '/usr/sbin/ebtables',
  iproute2: '/usr/sbin/ip',
  'busybox-static': '/bin/busybox',
};

/**
 * Makes sure that this machine can hold nodes: Linux, root, and Debian's packages, which are installed where they are
 * missing. Fails with `failed_precondition`, saying what to do.
 */
export async function ensureNodePackages(onProgress: (line: string) => void): Promise<void> {
  if (process.platform !== 'linux' || process.getuid?.() !== 0) {
    throw new ClusterError(
      'failed_precondition',
      'a real node needs namespaces, cgroups and mounts: run this as root on Linux (in a virtual machine or a ' +
        'privileged container of your own if this is not yours to change)',
    );
  }
  const missing = await missingPackages();
  if (missing.length === 0) {
    return;
  }
  const command = `apt-get install --no-install-recommends ${missing.join(' ')}`;
  onProgress(`installing ${missing.join(', ')} with apt-get, once`);
  try {
    await aptGet('update');
    await aptGet('install', '--yes', '--no-install-recommends', ...missing);
  } catch (error) {
    throw new ClusterError(
      'failed_precondition',
      `a real node needs ${missing.join(', ')}; on Debian or Ubuntu: ${command}`,
      { cause: error },
    );
  }
  const absent = await missingPackages();
  if (absent.length > 0) {
    const files = absent.map((name) => packages[name]).join(', ');
    throw new ClusterError('failed_precondition', `after ${command} there is still no ${files}`);
  }
}

async function missingPackages(): Promise<readonly string[]> {
  const names = await Promise.all(
    Object.entries(packages).map(async ([name, file]) =>
      access(file).then(
        () => [],
        () => [name],
      ),
    ),
  );
  return names.flat();
}

async function aptGet(...args: readonly string[]): Promise<void> {
  await promisify(execFile)('apt-get', ['-qq', ...args], {
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
  });
}
