// The programs of a real Kubernetes: built once from the Go modules in tools/, into the cache outside the checkout,
// under a key of their inputs. Owns the build, its lock and its progress; does not run the programs.
// Each folder of tools/ is a separate module, so that no program's dependencies raise another's.

import { createHash } from 'node:crypto';
import { access, mkdir, mkdtemp, readdir, readFile, rename, rm, symlink } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { beforeAbort } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { withFileLock } from '@mimo/core/process/file-lock';

import { startChild } from '../../../cli/src/local/child-process.ts';
import { cacheDirectoryFrom, type FindOptions } from '../../../cli/src/local/nats-server.ts';

const toolsDirectory = join(import.meta.dirname, 'tools');
const progressMs = 30_000;
/** A build downloads its modules, and networks fail at times; what has come is kept. */
const buildAttempts = 3;
const betweenAttemptsMs = 1_000;
/** What Go says of a source that does not compile, which no other attempt changes. */
const compileError = /^\S+\.go:\d+:\d+: /m;

/** Paths of programs. */
export interface KubernetesTools {
  readonly kubeApiserver: string;
  readonly kubeControllerManager: string;
  readonly kubeScheduler: string;
  readonly kubelet: string;
  readonly kubeProxy: string;
  readonly kubectl: string;
  readonly etcd: string;
  readonly helm: string;
  readonly coredns: string;
  readonly kubeNetworkPolicies: string;
  /** Holds the packets of a queue for a while. */
  readonly delay: string;
}

/** A Go module of tools/ and what is built from it. */
export interface ToolModule {
  /** The folder under tools/. */
  readonly name: string;
  /** The dependency whose version the build is told and named by. */
  readonly versionOf: string;
  /** Go package by the file name that its program gets. */
  readonly programs: Readonly<Record<string, string>>;
  /** Other names of the first program, which acts by its name. */
  readonly links: readonly string[];
  /** Linker's variables, from the version as in `v1.2.3`. */
  readonly variables: (version: string) => Readonly<Record<string, string>>;
  /** What a build from an empty cache of packages takes on two cores. */
  readonly durationText: string;
}

const kubernetes: ToolModule = {
  name: 'kubernetes',
  versionOf: 'k8s.io/kubernetes',
  programs: { kubernetes: '.', etcd: 'go.etcd.io/etcd/server/v3' },
  links: ['kube-apiserver', 'kube-controller-manager', 'kube-scheduler', 'kubelet', 'kube-proxy', 'kubectl'],
  // Without a version the components take themselves for v0.0.0 and refuse each other's skew.
  variables: (version) => {
    const [major = '', minor = ''] = version.slice(1).split('.');
    return {
      'k8s.io/component-base/version.gitVersion': version,
      'k8s.io/component-base/version.gitMajor': major,
      'k8s.io/component-base/version.gitMinor': minor,
    };
  },
  durationText: '5 to 15 minutes',
};
const helm: ToolModule = {
  name: 'helm',
  versionOf: 'helm.sh/helm/v4',
  programs: { helm: 'helm.sh/helm/v4/cmd/helm' },
  links: [],
  variables: (version) => ({ 'helm.sh/helm/v4/internal/version.version': version }),
  durationText: '1 to 4 minutes',
};
const coredns: ToolModule = {
  name: 'coredns',
  versionOf: 'github.com/coredns/coredns',
  programs: { coredns: '.' },
  links: [],
  variables: () => ({}),
  durationText: '1 to 3 minutes',
};
const kubeNetworkPolicies: ToolModule = {
  name: 'kube-network-policies',
  versionOf: 'sigs.k8s.io/kube-network-policies',
  programs: { 'kube-network-policies': '.' },
  links: [],
  variables: () => ({}),
  durationText: '1 to 2 minutes',
};
const delay: ToolModule = {
  name: 'delay',
  versionOf: 'github.com/florianl/go-nfqueue/v2',
  programs: { delay: '.' },
  links: [],
  variables: () => ({}),
  durationText: 'seconds',
};

/**
 * Names a build: version, then a digest of every source of the module, the platform and the linker's flags. Whatever
 * may change a program changes the key. Fails with `failed_precondition` if go.mod does not name the version.
 */
export async function toolKey(module: ToolModule, directory: string): Promise<string> {
  const version = await versionOf(module, directory);
  const digest = createHash('sha256').update(`${process.platform} ${process.arch}\n`);
  digest.update(JSON.stringify([module.programs, module.links, module.variables(version)]));
  for (const file of (await readdir(directory)).toSorted()) {
    digest.update(`\n${file}\n`).update(await readFile(join(directory, file)));
  }
  return `${module.name}-${version}-${digest.digest('hex').slice(0, 12)}`;
}

async function versionOf(module: ToolModule, directory: string): Promise<string> {
  const file = join(directory, 'go.mod');
  const line = (await readFile(file, 'utf8'))
    .split('\n')
    .map((text) => text.trim().replace(/^require /, ''))
    .find((text) => text.startsWith(`${module.versionOf} v`));
  if (line === undefined) {
    throw new ClusterError('failed_precondition', `${file} names no version of ${module.versionOf}`);
  }
  return line.split(' ')[1] ?? '';
}

interface GoRun {
  readonly args: readonly string[];
  readonly directory: string;
  readonly logFile: string;
  /** Says, while it runs, how far it is. */
  readonly onLog?: (lines: number) => void;
}

/** Runs `go`; gives its exit code and the end of what it said. It does not outlive this process. */
async function runGo(run: GoRun, options: FindOptions): Promise<{ code: number | null; text: string }> {
  const env = { ...(options.env ?? process.env), CGO_ENABLED: '0', GOFLAGS: '-mod=readonly -trimpath' };
  const child = await startChild({
    name: 'go',
    command: ['go', '-C', run.directory, ...run.args],
    env,
    logFile: run.logFile,
  });
  const ended = new AbortController();
  void child.exited.finally(() => ended.abort());
  void (async () => {
    for (;;) {
      await sleep(progressMs, undefined, { signal: ended.signal });
      run.onLog?.((await readFile(run.logFile, 'utf8')).split('\n').length - 1);
    }
  })().catch(() => undefined);
  try {
    const { code } = await beforeAbort(child.exited, options.signal);
    return { code, text: child.logTail().trim() };
  } finally {
    await child.stop(0);
  }
}

async function assertGo(directory: string, logFile: string, options: FindOptions): Promise<void> {
  // Asked inside the module, Go compares itself with go.mod, and fetches a newer self where its settings let it.
  const { code, text } = await runGo({ args: ['env', 'GOVERSION'], directory, logFile }, options);
  if (code !== 0) {
    throw new ClusterError(
      'failed_precondition',
      `the programs of Kubernetes are built here once, and that needs Go 1.26 or later on the PATH, which is missing ` +
        `or too old. Install it (https://go.dev/dl; Debian: golang-1.26-go, then PATH=/usr/lib/go-1.26/bin:$PATH), ` +
        `or bring the folder ${join(options.cacheDirectory, 'kubernetes')} from a machine that has it.\n${text}`,
    );
  }
}

/** Runs a build, again where it fails for what may be a network's fault. */
async function buildProgram(run: GoRun, what: string, options: FindOptions): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    const { code, text } = await runGo(run, options);
    if (code === 0) {
      return;
    }
    if (attempt === buildAttempts || compileError.test(text)) {
      throw new ClusterError('unavailable', `${what} cannot be built here:\n${text}`);
    }
    options.onProgress(`attempt ${attempt} of ${buildAttempts} to build ${what} failed:\n${text}`);
    await rm(run.logFile);
    await sleep(attempt * betweenAttemptsMs, undefined, { signal: options.signal });
  }
}

async function buildModule(
  module: ToolModule,
  directory: string,
  target: string,
  options: FindOptions,
): Promise<void> {
  const version = await versionOf(module, directory);
  const work = await mkdtemp(`${target}.build-`);
  const begin = performance.now();
  try {
    await mkdir(join(work, 'bin'));
    await assertGo(directory, join(work, 'version.log'), options);
    options.onProgress(
      `building ${Object.keys(module.programs).join(' and ')} ${version} from Go modules, once: ${module.durationText}`,
    );
    const variables = Object.entries(module.variables(version)).map(([name, value]) => `-X ${name}=${value}`);
    const flags = `-ldflags=-s -w ${variables.join(' ')}`;
    for (const [program, goPackage] of Object.entries(module.programs)) {
      await buildProgram(
        {
          args: ['build', '-v', flags, '-o', join(work, 'bin', program), goPackage],
          directory,
          logFile: join(work, `${program}.log`),
          onLog: (lines) => options.onProgress(`building ${program}: ${lines} packages`),
        },
        `${program} ${version}`,
        options,
      );
    }
    const [first = ''] = Object.keys(module.programs);
    for (const link of module.links) {
      await symlink(first, join(work, 'bin', link));
    }
    await rename(join(work, 'bin'), target);
    options.onProgress(`built ${module.name} in ${((performance.now() - begin) / 1000).toFixed(0)} s`);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/**
 * Gives the folder with a module's programs, building them where the cache has none. Processes that ask at the same
 * time build once; an interrupted build leaves nothing that looks complete. Fails with `failed_precondition`, saying
 * what to do, without a recent Go, and with `unavailable` and Go's words where the build fails.
 */
export async function findToolModule(
  module: ToolModule,
  options: FindOptions,
  directory = join(toolsDirectory, module.name),
): Promise<string> {
  const parent = join(options.cacheDirectory, 'kubernetes');
  const target = join(parent, await toolKey(module, directory));
  const isCached = async (): Promise<boolean> =>
    access(target).then(
      () => true,
      () => false,
    );
  if (!(await isCached())) {
    await mkdir(parent, { recursive: true });
    await withFileLock(
      `${target}.lock`,
      async () => {
        if (!(await isCached())) {
          await buildModule(module, directory, target, options);
        }
      },
      options.signal,
    );
  }
  return target;
}

/**
 * Gives the paths of all programs; see `findToolModule` for what it does and how it fails. Where options are left out:
 * the cache that the environment names, and progress on standard error.
 */
export async function findTools(given: Partial<FindOptions> = {}): Promise<KubernetesTools> {
  const options: FindOptions = {
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: (line) => process.stderr.write(`mimo: ${line}\n`),
    signal: new AbortController().signal,
    ...given,
  };
  const kubernetesDirectory = await findToolModule(kubernetes, options);
  const helmDirectory = await findToolModule(helm, options);
  const corednsDirectory = await findToolModule(coredns, options);
  const policiesDirectory = await findToolModule(kubeNetworkPolicies, options);
  const delayDirectory = await findToolModule(delay, options);
  return {
    kubeApiserver: join(kubernetesDirectory, 'kube-apiserver'),
    kubeControllerManager: join(kubernetesDirectory, 'kube-controller-manager'),
    kubeScheduler: join(kubernetesDirectory, 'kube-scheduler'),
    kubelet: join(kubernetesDirectory, 'kubelet'),
    kubeProxy: join(kubernetesDirectory, 'kube-proxy'),
    kubectl: join(kubernetesDirectory, 'kubectl'),
    etcd: join(kubernetesDirectory, 'etcd'),
    helm: join(helmDirectory, 'helm'),
    coredns: join(corednsDirectory, 'coredns'),
    kubeNetworkPolicies: join(policiesDirectory, 'kube-network-policies'),
    delay: join(delayDirectory, 'delay'),
  };
}
