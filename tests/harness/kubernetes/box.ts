// A machine in a box: network, mount, process, name and IPC namespaces in which one node of a cluster lives, so that
// nothing of it reaches this machine's network, mounts, /var, /run or processes. Owns the namespaces, the wiring of
// boxes with one another and the processes inside; RunDirectory ends them. No packet leaves: there is no uplink.

import { execFile, spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';

import { waitFor } from '../wait-for.ts';
import type { RunDirectory } from './run-directory.ts';

const namespaces = ['--net', '--mount', '--pid', '--uts', '--ipc'];
const logTailChars = 4_000;
const maxOutputBytes = 64 * 2 ** 20;

// Process 1 of the box. The files of /var are this box's own, under the run's directory, where they can be reached from
// outside too; they come before the second make-rshared because the kubelet needs its directory on a shared mount.
const holderScript = `
set -e
directory=$1 name=$2
mount --make-rshared /
hostname "$name"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns
mkdir -p "$directory/var/lib/kubelet" "$directory/var/log" "$directory/var/tmp"
ln -s /run "$directory/var/run"
mount --bind "$directory/var" /var
mount --make-rshared /
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
sysctl -qw net.bridge.bridge-nf-call-iptables=1 || true
touch "$directory/ready"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
`;

/** A process in a box. It ends with its box at the latest. */
export interface BoxProcess {
  readonly name: string;
  readonly logFile: string;
  readonly exited: Promise<unknown>;
  isRunning(): boolean;
  /** The end of what it wrote. */
  logTail(): string;
  signal(signal: NodeJS.Signals): void;
  /** SIGTERM, and SIGKILL ten seconds later; returns when it is gone. */
  stop(): Promise<void>;
  /** SIGKILL, as a crash; returns when it is gone. */
  kill(): Promise<void>;
}

export interface Box {
  readonly name: string;
  readonly directory: string;
  /** Path of the box's cgroup under each hierarchy. */
  readonly cgroup: string;
  readonly address: string;
  /** Runs a command inside and gives its standard output; fails with its standard error. */
  run(...command: readonly string[]): Promise<string>;
  /** Starts a process inside; its output goes to `log/<name>` in the box's directory, appended. */
  start(name: string, command: readonly string[], env?: NodeJS.ProcessEnv): Promise<BoxProcess>;
}

export interface BoxOptions {
  readonly run: RunDirectory;
  /** Also its host name. */
  readonly name: string;
  /** In 198.18.0.0/24. */
  readonly address: string;
}

/** Makes a box without any network but its loopback. It lives until the run's directory is closed. */
export async function createBox(options: BoxOptions): Promise<Box> {
  const { run, name } = options;
  const directory = join(run.path, name);
  await mkdir(join(directory, 'log'), { recursive: true });
  const cgroup = `/${run.cgroupPrefix}-${name}`;
  await createCgroups(cgroup);
  const logFile = join(directory, 'log/box');
  const log = openSync(logFile, 'a');
  const outer = spawn(
    'unshare',
    [
      ...namespaces,
      '--fork',
      '--kill-child',
      '--mount-proc',
      '--propagation=slave',
      '/bin/bash',
      '-c',
      holderScript,
      'bash',
      directory,
      name,
    ],
    { detached: true, stdio: ['ignore', log, log] },
  );
  closeSync(log);
  outer.unref();
  let failed: Error | undefined;
  outer.once('error', (error) => {
    failed = error;
  });
  await waitFor(`box ${name} to exist`, async () => {
    if (outer.exitCode !== null) {
      failed ??= new Error(tail(logFile));
    }
    return failed !== undefined || (await readFile(join(directory, 'ready')).then(() => true));
  });
  if (failed !== undefined || outer.pid === undefined) {
    throw new ClusterError('failed_precondition', `box ${name} cannot be made: ${failed?.message}`);
  }
  const holder = await childOf(outer.pid, name);
  await writeFile(join(directory, 'holder'), String(holder));
  return new NamespaceBox({ name, directory, cgroup, address: options.address, holder });
}

class NamespaceBox implements Box {
  readonly name: string;
  readonly directory: string;
  readonly cgroup: string;
  readonly address: string;
  /** Process 1 of the box, by its number outside. */
  readonly holder: number;

  constructor(options: {
    readonly name: string;
    readonly directory: string;
    readonly cgroup: string;
    readonly address: string;
    readonly holder: number;
  }) {
    this.name = options.name;
    this.directory = options.directory;
    this.cgroup = options.cgroup;
    this.address = options.address;
    this.holder = options.holder;
  }

  #enter(command: readonly string[]): readonly string[] {
    return ['--target', String(this.holder), ...namespaces, '--', ...command];
  }

  async run(...command: readonly string[]): Promise<string> {
    try {
      const { stdout } = await promisify(execFile)('nsenter', this.#enter(command), {
        maxBuffer: maxOutputBytes,
      });
      return stdout;
    } catch (error) {
      const text = error instanceof Error && 'stderr' in error ? String(error.stderr).trim() : String(error);
      throw new ClusterError('internal', `in ${this.name}: ${command.join(' ')}: ${text}`, { cause: error });
    }
  }

  async start(name: string, command: readonly string[], env?: NodeJS.ProcessEnv): Promise<BoxProcess> {
    const logFile = join(this.directory, 'log', name);
    const log = openSync(logFile, 'a');
    const outer = spawn('nsenter', this.#enter(command), {
      detached: true,
      env: { ...process.env, ...env },
      stdio: ['ignore', log, log],
    });
    closeSync(log);
    outer.unref();
    const exited = once(outer, 'exit').catch(() => undefined);
    await once(outer, 'spawn');
    const inner = await childOf(outer.pid ?? 0, name).catch(() => undefined);
    if (inner === undefined) {
      throw new ClusterError('internal', `${name} ended at once in ${this.name}:\n${tail(logFile)}`);
    }
    return new NamespaceProcess({ name, logFile, outer, inner, exited });
  }
}

/** nsenter waits for the program, which is its child in the other process namespace, and hands no signal on. */
class NamespaceProcess implements BoxProcess {
  readonly name: string;
  readonly logFile: string;
  readonly exited: Promise<unknown>;
  readonly #outer: ChildProcess;
  readonly #inner: number;

  constructor(options: {
    readonly name: string;
    readonly logFile: string;
    readonly outer: ChildProcess;
    readonly inner: number;
    readonly exited: Promise<unknown>;
  }) {
    this.name = options.name;
    this.logFile = options.logFile;
    this.#outer = options.outer;
    this.#inner = options.inner;
    this.exited = options.exited;
  }

  isRunning(): boolean {
    return this.#outer.exitCode === null && this.#outer.signalCode === null;
  }

  logTail(): string {
    return tail(this.logFile);
  }

  signal(signal: NodeJS.Signals): void {
    if (this.isRunning()) {
      try {
        process.kill(this.#inner, signal);
      } catch {
        // Gone between the question and the signal.
      }
    }
  }

  async stop(): Promise<void> {
    this.signal('SIGTERM');
    const giveUp = setTimeout(() => this.signal('SIGKILL'), 10_000);
    await this.exited;
    clearTimeout(giveUp);
  }

  async kill(): Promise<void> {
    this.signal('SIGKILL');
    await this.exited;
  }
}

/** The one child of a process: what `unshare --fork` and `nsenter --pid` started. Fails if it has ended already. */
async function childOf(pid: number, name: string): Promise<number> {
  let child = Number.NaN;
  await waitFor(
    `process ${name}`,
    async () => {
      const children = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8').catch(() => undefined);
      child = Number.parseInt(children ?? '', 10);
      return children === undefined || Number.isInteger(child);
    },
    60_000,
  );
  if (!Number.isInteger(child)) {
    throw new ClusterError('internal', `${name} ended at once`);
  }
  return child;
}

function tail(file: string): string {
  try {
    return readFileSync(file, 'utf8').slice(-logTailChars);
  } catch {
    return '';
  }
}

/** Makes the box's cgroup in every hierarchy of this machine, v1 or v2. */
async function createCgroups(cgroup: string): Promise<void> {
  for (const { mountPoint, controllers } of cgroupHierarchies(readFileSync('/proc/mounts', 'utf8'))) {
    const directory = join(mountPoint, cgroup);
    await mkdir(directory, { recursive: true });
    if (controllers.includes('cpuset')) {
      // A v1 cpuset starts empty, and no process can enter it before it has processors and memory.
      for (const file of ['cpuset.cpus', 'cpuset.mems']) {
        await writeFile(join(directory, file), await readFile(join(dirname(directory), file), 'utf8'));
      }
    }
  }
}

/** The cgroup hierarchies of a mount table. `controllers` is empty for v2, whose controllers need no preparation. */
function cgroupHierarchies(
  mounts: string,
): readonly { readonly mountPoint: string; readonly controllers: readonly string[] }[] {
  return mounts.split('\n').flatMap((line) => {
    const [, mountPoint = '', type, flags = ''] = line.split(' ');
    if (type !== 'cgroup' && type !== 'cgroup2') {
      return [];
    }
    return [{ mountPoint, controllers: type === 'cgroup' ? flags.split(',') : [] }];
  });
}

const prefixBits = 24;

/**
 * Gives the first box the bridge on which the others hang. Its default route leads nowhere: without one, addresses of
 * Services are unreachable before they are translated.
 */
export async function createBridge(first: Box): Promise<void> {
  const ip = (args: string): Promise<string> => first.run('ip', ...args.split(' '));
  await ip('link add node0 type bridge');
  await ip(`address add ${first.address}/${prefixBits} dev node0`);
  await ip('link set node0 up');
  await ip('route add default dev node0');
}

/** Hangs a box on the first one's bridge by a pair of veths; the end in the first box is named `v-<name>`. */
export async function plugIn(box: Box, first: Box): Promise<void> {
  const holderOf = ({ directory }: Box): Promise<string> => readFile(join(directory, 'holder'), 'utf8');
  const link = `link add ${vethOf(box)} type veth peer name eth0 netns ${await holderOf(box)}`;
  // The first box has a /proc of its own, in which that process number means nothing: its network alone is entered.
  await promisify(execFile)('nsenter', [
    `--net=/proc/${await holderOf(first)}/ns/net`,
    'ip',
    ...link.split(' '),
  ]);
  await first.run('ip', 'link', 'set', vethOf(box), 'master', 'node0', 'up');
  const ip = (args: string): Promise<string> => box.run('ip', ...args.split(' '));
  await ip(`address add ${box.address}/${prefixBits} dev eth0`);
  await ip('link set eth0 up');
  await ip(`route add default via ${first.address}`);
}

/** Waits until a process of a box reads the packets of an NFQUEUE; fails with its last words where it ends instead. */
export async function waitForPacketReader(box: Box, reader: BoxProcess, queue: number): Promise<void> {
  const isRead = new RegExp(String.raw`^\s*${queue}\s`, 'm');
  await waitFor(
    `${reader.name} of ${box.name} to read queue ${queue}`,
    async () =>
      !reader.isRunning() || isRead.test(await box.run('cat', '/proc/net/netfilter/nfnetlink_queue')),
  );
  if (!reader.isRunning()) {
    throw new ClusterError('unavailable', `${reader.name} of ${box.name} ended:\n${reader.logTail()}`);
  }
}

/** The end of a box's cable, in the first box. */
export function vethOf(box: Box): string {
  return `v-${box.name}`;
}
