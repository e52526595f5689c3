// A real Kubernetes cluster on this machine: a control plane and nodes, each in a box of namespaces, nothing of which
// outlives it. Owns the order of start and end, kubectl, and ports of this machine into the cluster. Knows nothing
// about the software installed in it.

import { execFile } from 'node:child_process';
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';

import { controlPlaneAddress, nodeAddress, nodePodRange } from './addresses.ts';
import { createBox, createBridge, plugIn, type Box } from './box.ts';
import { startBoxControlPlane, type BoxControlPlane, type ControlPlaneTools } from './box-control-plane.ts';
import { ensureNodePackages } from './debian-packages.ts';
import { startDns } from './dns.ts';
import { forward, type Forward } from './forward.ts';
import { startGpuPlugin, type GpuPlugin } from './gpu-plugin.ts';
import { startNode, type ClusterNode, type NodeTools } from './node.ts';
import { createPauseImage } from './oci-image.ts';
import { createRunDirectory } from './run-directory.ts';

const maxOutputBytes = 64 * 2 ** 20;

/** Paths of the programs of a cluster. */
interface RealClusterTools extends ControlPlaneTools, NodeTools {
  readonly kubectl: string;
  readonly coredns: string;
}

export interface RealClusterOptions {
  readonly tools: RealClusterTools;
  /** 1 to 9. */
  readonly nodes: number;
  /** Pretend GPUs of each node; 0: none, and no device plugin. */
  readonly gpusPerNode: number;
  /** Lines for the user: what has come up. */
  readonly onProgress: (line: string) => void;
}

/** A running cluster. Close it. */
export interface RealCluster {
  readonly kubeconfigFile: string;
  /** Files that pods may mount by hostPath, readable by every user; removed at the end. */
  readonly sharedDirectory: string;
  readonly controlPlane: BoxControlPlane;
  readonly controlPlaneBox: Box;
  readonly nodes: readonly ClusterNode[];
  /** By node. */
  readonly gpus: readonly GpuPlugin[];
  /** Runs kubectl as an administrator; gives its output. Fails with its standard error. */
  kubectl(...args: readonly string[]): Promise<string>;
  /** `kubectl apply` of objects. */
  apply(...manifests: readonly unknown[]): Promise<void>;
  /** Gives the image in a tar to every node. */
  importImage(file: string): Promise<void>;
  /** A port on 127.0.0.1 that dials from a node, the first one unless said otherwise. */
  forward(target: { readonly host: string; readonly port: number }, node?: number): Promise<Forward>;
  /** Idempotent. */
  close(): Promise<void>;
}

/** Starts a cluster; when it returns every node is Ready, with its GPUs. */
export async function startRealCluster(options: RealClusterOptions): Promise<RealCluster> {
  const { tools, onProgress } = options;
  await ensureNodePackages(onProgress);
  const run = await createRunDirectory();
  const forwards: Forward[] = [];
  const gpus: GpuPlugin[] = [];
  let closing: Promise<void> | undefined;
  const closeAll = async (): Promise<void> => {
    await Promise.all(gpus.map((plugin) => plugin.close()));
    await Promise.all(forwards.map((each) => each.close()));
    await run.close();
  };
  const close = (): Promise<void> => (closing ??= closeAll());
  try {
    const box = await createBox({ run, name: 'control-plane', address: controlPlaneAddress });
    await createBridge(box);
    const controlPlane = await startBoxControlPlane(box, tools);
    forwards.push(controlPlane.forward);
    onProgress('control plane ready');
    const { pki, kubeconfigFile, internalUrl } = controlPlane;
    const kubectl = async (...args: readonly string[]): Promise<string> =>
      runKubectl(tools.kubectl, ['--kubeconfig', kubeconfigFile, ...args]);
    const apply = async (...manifests: readonly unknown[]): Promise<void> => {
      const list = { apiVersion: 'v1', kind: 'List', items: manifests };
      await runKubectl(
        tools.kubectl,
        ['--kubeconfig', kubeconfigFile, 'apply', '--server-side', '-f', '-'],
        list,
      );
    };
    await apply({
      apiVersion: 'rbac.authorization.k8s.io/v1',
      kind: 'ClusterRoleBinding',
      metadata: { name: 'kube-proxy' },
      roleRef: {
        apiGroup: 'rbac.authorization.k8s.io',
        kind: 'ClusterRole',
        name: 'system:node-proxier',
      },
      subjects: [{ apiGroup: 'rbac.authorization.k8s.io', kind: 'User', name: 'system:kube-proxy' }],
    });
    const admin = await pki.issueClient('coredns', { user: 'coredns', group: 'system:masters' });
    await startDns({
      box,
      coredns: tools.coredns,
      kubeconfigFile: await pki.writeKubeconfig('coredns', internalUrl, admin),
      apply: (manifests) => apply(...manifests),
    });
    const pauseImage = await createPauseImage(run.path);
    const nodes = await Promise.all(
      Array.from({ length: options.nodes }, async (_, at) => {
        const index = at + 1;
        const nodeBox = await createBox({ run, name: `node-${index}`, address: nodeAddress(index) });
        await plugIn(nodeBox, box);
        const subnet = nodePodRange(index);
        return startNode({
          box: nodeBox,
          tools,
          pki,
          apiUrl: internalUrl,
          podRange: subnet,
          pauseImage,
        });
      }),
    );
    await routePods([box, ...nodes.map((node) => node.box)]);
    for (const node of nodes) {
      await kubectlWait(kubectl, 'create', `node/${node.name}`);
      await kubectlWait(kubectl, 'condition=Ready', `node/${node.name}`);
      if (options.gpusPerNode > 0) {
        const directory = node.devicePluginDirectory;
        gpus.push(await startGpuPlugin({ directory, count: options.gpusPerNode }));
        const path = String.raw`{.status.allocatable.nvidia\.com/gpu}`;
        await kubectlWait(kubectl, `jsonpath=${path}=${options.gpusPerNode}`, `node/${node.name}`);
      }
      onProgress(`${node.name} ready`);
    }
    const sharedDirectory = join(run.path, 'shared');
    await mkdir(sharedDirectory);
    return {
      kubeconfigFile,
      sharedDirectory,
      controlPlane,
      controlPlaneBox: box,
      nodes,
      gpus,
      kubectl,
      apply,
      importImage: async (file) => {
        await Promise.all(nodes.map((node) => node.importImage(file)));
      },
      forward: async (target, node = 0) => {
        const from = nodes[node];
        if (from === undefined) {
          throw new RangeError(`there is no node ${node}`);
        }
        const forwarded = await forward(from.box, target);
        forwards.push(forwarded);
        return forwarded;
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

type Kubectl = (...args: readonly string[]) => Promise<string>;

async function kubectlWait(kubectl: Kubectl, condition: string, object: string): Promise<void> {
  await kubectl('wait', `--for=${condition}`, object, '--timeout=120s');
}

/** Every box knows on which node's address each node's pods live; the first box is no node. */
async function routePods(boxes: readonly Box[]): Promise<void> {
  for (const box of boxes) {
    for (const [index, other] of boxes.entries()) {
      if (index > 0 && other !== box) {
        await box.run('ip', 'route', 'add', nodePodRange(index), 'via', other.address);
      }
    }
  }
}

async function runKubectl(kubectl: string, args: readonly string[], input?: unknown): Promise<string> {
  const running = promisify(execFile)(kubectl, args, {
    maxBuffer: maxOutputBytes,
    // Its cache of what the server offers lies in the home directory; every run's server has the same address.
    env: { ...process.env, HOME: dirname(args[1] ?? ''), KUBECONFIG: undefined },
  });
  if (input !== undefined) {
    running.child.stdin?.end(JSON.stringify(input));
  }
  try {
    return (await running).stdout;
  } catch (error) {
    const text = error instanceof Error && 'stderr' in error ? String(error.stderr).trim() : String(error);
    throw new Error(`kubectl ${args.slice(2).join(' ')}: ${text}`, { cause: error });
  }
}
