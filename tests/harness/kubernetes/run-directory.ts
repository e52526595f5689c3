// The traces of one cluster on the machine, and their removal: a directory, cgroups, the holders of its namespaces, and
// the sysctls that a kubelet sets for the whole machine. A small shell waits on a pipe from this process and cleans up
// when the pipe closes, which the kernel does even after a kill -9; an orderly close closes the pipe and waits.

import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { chmod, mkdtemp, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Writable } from 'node:stream';

import { ClusterError } from '@mimo/core/process/errors';

import { isAlive } from '../wait-for.ts';

const prefix = 'mimo-kube-';

/** The kubelet writes these for the whole machine, whatever namespaces it is in. */
const sysctls = [
  'vm.overcommit_memory',
  'vm.panic_on_oom',
  'kernel.panic',
  'kernel.panic_on_oops',
  'kernel.keys.root_maxkeys',
  'kernel.keys.root_maxbytes',
] as const;

// Arguments: the run's directory, then its cgroups' name prefix. A holder is known by the directory in its command
// line, so that a number that another process has since got kills nobody. What is mounted dies with the namespaces. Of
// several runs at a time the last one restores the sysctls.
const cleanUpScript = `
directory=$1 cgroups=$2
for file in "$directory"/*/holder; do
  [ -e "$file" ] || continue
  pid=$(cat "$file")
  grep -qsF "$directory" "/proc/$pid/cmdline" && kill -9 "$pid"
done
for attempt in $(seq 200); do
  left=$(find /sys/fs/cgroup -path "*/$cgroups*" -name cgroup.procs -exec cat {} + 2>/dev/null)
  [ -z "$left" ] && break
  kill -9 $left 2>/dev/null
  sleep 0.05
done
for attempt in $(seq 40); do
  find /sys/fs/cgroup -depth -type d -path "*/$cgroups*" -exec rmdir {} + 2>/dev/null
  [ -z "$(find /sys/fs/cgroup -type d -path "*/$cgroups*" -print -quit)" ] && break
  sleep 0.05
done
others=$(find "$(dirname "$directory")" -mindepth 2 -maxdepth 2 -path "*/${prefix}*/sysctls" -not -path "$directory/*")
[ -z "$others" ] && [ -e "$directory/sysctls" ] && sysctl -qw $(cat "$directory/sysctls")
for attempt in $(seq 40); do
  rm -rf --one-file-system "$directory" 2>/dev/null && break
  sleep 0.1
done
[ ! -e "$directory" ]
`;

/** The place of one cluster on this machine. Close it. */
export interface RunDirectory {
  readonly path: string;
  /** Starts the name of each of the run's cgroups; unique to the run. */
  readonly cgroupPrefix: string;
  /** Ends every box of the run and removes all that it left. Idempotent. */
  close(): Promise<void>;
}

/** Makes a directory for a cluster, after removing what killed runs left. The clean-up outlives this process. */
export async function createRunDirectory(): Promise<RunDirectory> {
  await removeLeftovers();
  const path = await mkdtemp(join(tmpdir(), prefix));
  // Images run as a user of their own and read what is mounted from here.
  await chmod(path, 0o755);
  await writeFile(join(path, 'owner'), String(process.pid));
  await writeFile(join(path, 'sysctls'), await originalSysctls());
  const cgroupPrefix = cgroupPrefixOf(path);
  const cleaner = spawn('/bin/sh', ['-c', `read _\n${cleanUpScript}`, 'sh', path, cgroupPrefix], {
    detached: true,
    stdio: ['pipe', 'ignore', 'ignore'],
  });
  let closing: Promise<void> | undefined;
  return {
    path,
    cgroupPrefix,
    close: () => (closing ??= finish(cleaner, path)),
  };
}

async function finish(cleaner: ChildProcess, path: string): Promise<void> {
  const ended = once(cleaner, 'exit');
  (cleaner.stdin as Writable).end();
  const [code] = (await ended) as [number | null];
  if (code !== 0) {
    throw new ClusterError('internal', `${path} could not be removed: something still uses it`);
  }
}

/** A run's directory is the last part of its cgroups' names, so that either is found by the other. */
function cgroupPrefixOf(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}

/** The values before any run: another run's record of them where one is going on, else those of this moment. */
async function originalSysctls(): Promise<string> {
  for (const name of await runNames()) {
    const recorded = await readFile(join(tmpdir(), name, 'sysctls'), 'utf8').catch(() => undefined);
    if (recorded !== undefined) {
      return recorded;
    }
  }
  const lines = await Promise.all(
    sysctls.map(async (name) => {
      const value = await readFile(`/proc/sys/${name.replaceAll('.', '/')}`, 'utf8').catch(() => undefined);
      return value === undefined ? [] : [`${name}=${value.trim()}`];
    }),
  );
  return lines.flat().join('\n');
}

async function runNames(): Promise<readonly string[]> {
  return (await readdir(tmpdir())).filter((name) => name.startsWith(prefix));
}

/** Removes what is left of runs whose process is gone. */
async function removeLeftovers(): Promise<void> {
  for (const name of await runNames()) {
    const path = join(tmpdir(), name);
    const owner = Number(await readFile(join(path, 'owner'), 'utf8').catch(() => Number.NaN));
    const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Date.now() }));
    // Without an owner it is of a run between two of its first system calls, or of one that died there.
    const isAbandoned = Number.isInteger(owner) ? !isAlive(owner) : Date.now() - mtimeMs > 60_000;
    if (isAbandoned) {
      const cleaner = spawn('/bin/sh', ['-c', cleanUpScript, 'sh', path, cgroupPrefixOf(path)], {
        stdio: 'ignore',
      });
      await once(cleaner, 'exit');
    }
  }
}
