// One node of a cluster in a box: containerd with runc and a CNI bridge, kubelet, kube-proxy and kube-network-policies,
// all real. Owns their configuration and what this kind of machine needs (no systemd, cgroup v1 or v2, no
// CAP_SYS_RESOURCE). Knows no images but the one that holds a pod's namespaces.

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { waitFor } from '../wait-for.ts';
import { clusterDomain, dnsServiceAddress, podRange } from './addresses.ts';
import { waitForPacketReader, type Box, type BoxProcess } from './box.ts';
import type { Pki } from './pki.ts';

const runtimeSocket = '/run/containerd.sock';
const policyQueue = 100;

export interface NodeTools {
  readonly kubelet: string;
  readonly kubeProxy: string;
  readonly kubeNetworkPolicies: string;
}

export interface NodeOptions {
  readonly box: Box;
  readonly tools: NodeTools;
  readonly pki: Pki;
  /** Of the API server. */
  readonly apiUrl: string;
  /** In 198.18.64.0/18. */
  readonly podRange: string;
  /** The image whose process holds a pod's namespaces open: an OCI tar, and the name it has in it. */
  readonly pauseImage: { readonly file: string; readonly name: string };
}

/** A running node. It ends with its box. */
export interface ClusterNode {
  /** Its name in the cluster. */
  readonly name: string;
  readonly box: Box;
  readonly containerd: BoxProcess;
  readonly kubelet: BoxProcess;
  /** Of the kubelet's device plugins, as seen from outside. */
  readonly devicePluginDirectory: string;
  importImage(file: string): Promise<void>;
  /** SIGKILL to a container's first process, by the identifier in its pod's status. */
  killContainer(id: string): Promise<void>;
  restartContainerd(): Promise<void>;
  restartKubelet(): Promise<void>;
}

/** Starts a node; it registers itself, and is Ready some seconds later. */
export async function startNode(options: NodeOptions): Promise<ClusterNode> {
  const { box, tools, pki, apiUrl } = options;
  const { name } = box;
  const file = (relative: string): string => join(box.directory, relative);
  await mkdir(file('cni'));
  await writeFile(file('cni/10-bridge.conflist'), JSON.stringify(networkConfig(options.podRange)));
  await writeFile(file('containerd.toml'), containerdConfig(options));
  const runtime = ['ctr', '--address', runtimeSocket, '--namespace', 'k8s.io'];
  /** Returns when it answers: a kubelet asks it once at its own start, and ends where nobody does. */
  const startContainerd = async (): Promise<BoxProcess> => {
    const command = ['containerd', '--config', file('containerd.toml'), '--log-level', 'warn'];
    const started = await box.start('containerd', command);
    await waitFor(
      `containerd of ${name}`,
      async () => box.run(...runtime, 'images', 'list').then(() => true),
      60_000,
    );
    return started;
  };
  let containerd = await startContainerd();
  const importImage = async (image: string): Promise<void> => {
    await box.run(...runtime, 'images', 'import', image);
  };
  await importImage(options.pauseImage.file);

  const user = `system:node:${name}`;
  const [client, server, proxy, policies] = await Promise.all([
    pki.issueClient(`kubelet-${name}`, { user, group: 'system:nodes' }),
    pki.issueServer(`kubelet-server-${name}`, {
      user,
      dnsNames: [name],
      addresses: [box.address, '127.0.0.1'],
    }),
    pki.issueClient(`kube-proxy-${name}`, { user: 'system:kube-proxy' }),
    pki.issueClient(`kube-network-policies-${name}`, {
      user: 'kube-network-policies',
      group: 'system:masters',
    }),
  ]);
  // What pods inherit from their node: the search path comes from the kubelet.
  await writeFile(file('resolv.conf'), `nameserver ${dnsServiceAddress}\n`);
  await writeFile(
    file('kubelet.json'),
    JSON.stringify({
      apiVersion: 'kubelet.config.k8s.io/v1beta1',
      kind: 'KubeletConfiguration',
      authentication: {
        anonymous: { enabled: false },
        webhook: { enabled: true },
        x509: { clientCAFile: pki.certificateFile },
      },
      authorization: { mode: 'Webhook' },
      tlsCertFile: server.certificateFile,
      tlsPrivateKeyFile: server.keyFile,
      containerRuntimeEndpoint: `unix://${runtimeSocket}`,
      cgroupDriver: 'cgroupfs',
      cgroupRoot: box.cgroup,
      // Since 1.35 it exits on a machine with cgroup v1 unless it is told not to.
      failCgroupV1: false,
      failSwapOn: false,
      clusterDNS: [dnsServiceAddress],
      clusterDomain,
      resolvConf: file('resolv.conf'),
      seccompDefault: true,
      maxPods: 60,
      // Requests are shares, limits of CPU are no quotas: the nodes of a test share a few processors, and a pod that
      // was held to its small request would take minutes to start.
      cpuCFSQuota: false,
      // The disk is the machine's, and nothing here is worth evicting a pod for.
      evictionHard: { 'memory.available': '100Mi', 'nodefs.available': '1%', 'imagefs.available': '1%' },
      imageGCHighThresholdPercent: 100,
      imageGCLowThresholdPercent: 99,
      nodeStatusUpdateFrequency: '4s',
      // How soon a changed Secret is in the pods that mount it; the default is a minute.
      syncFrequency: '5s',
    }),
  );
  const kubeconfig = await pki.writeKubeconfig(`kubelet-${name}`, apiUrl, client);
  const startKubelet = (): Promise<BoxProcess> =>
    box.start('kubelet', [
      tools.kubelet,
      `--config=${file('kubelet.json')}`,
      `--kubeconfig=${kubeconfig}`,
      `--hostname-override=${name}`,
      `--node-ip=${box.address}`,
    ]);
  let kubelet = await startKubelet();
  await startKubeProxy({
    box,
    kubeProxy: tools.kubeProxy,
    kubeconfig: await pki.writeKubeconfig(`kube-proxy-${name}`, apiUrl, proxy),
  });
  await startNetworkPolicies({
    box,
    kubeNetworkPolicies: tools.kubeNetworkPolicies,
    kubeconfig: await pki.writeKubeconfig(`kube-network-policies-${name}`, apiUrl, policies),
  });
  return {
    name,
    box,
    devicePluginDirectory: file('var/lib/kubelet/device-plugins'),
    get containerd() {
      return containerd;
    },
    get kubelet() {
      return kubelet;
    },
    importImage,
    killContainer: async (id) => {
      await box.run(...runtime, 'tasks', 'kill', '--signal', 'SIGKILL', id);
    },
    restartContainerd: async () => {
      containerd = await startContainerd();
    },
    restartKubelet: async () => {
      kubelet = await startKubelet();
    },
  };
}

/** Lets a box reach Services; the kubeconfig is `system:kube-proxy`'s, which must be bound to `system:node-proxier`. */
async function startKubeProxy(options: {
  readonly box: Box;
  readonly kubeProxy: string;
  readonly kubeconfig: string;
}): Promise<BoxProcess> {
  const { box } = options;
  const configFile = join(box.directory, 'kube-proxy.json');
  await writeFile(
    configFile,
    JSON.stringify({
      apiVersion: 'kubeproxy.config.k8s.io/v1alpha1',
      kind: 'KubeProxyConfiguration',
      mode: 'nftables',
      clientConnection: { kubeconfig: options.kubeconfig },
      hostnameOverride: box.name,
      clusterCIDR: podRange,
      bindAddress: box.address,
      metricsBindAddress: '127.0.0.1:10249',
      // A namespace may not set the limits of connection tracking; zeros leave them.
      conntrack: { maxPerCore: 0, min: 0, tcpEstablishedTimeout: '0s', tcpCloseWaitTimeout: '0s' },
    }),
  );
  return box.start('kube-proxy', [options.kubeProxy, `--config=${configFile}`]);
}

/**
 * Enforces NetworkPolicies: the first packet of each connection that goes through the box waits for a verdict, and goes
 * nowhere without one. The kubeconfig must allow to list and watch pods, namespaces and network policies.
 */
async function startNetworkPolicies(options: {
  readonly box: Box;
  readonly kubeNetworkPolicies: string;
  readonly kubeconfig: string;
}): Promise<BoxProcess> {
  const { box } = options;
  const policies = await box.start('kube-network-policies', [
    options.kubeNetworkPolicies,
    `--kubeconfig=${options.kubeconfig}`,
    `--hostname-override=${box.name}`,
    `--nfqueue-id=${policyQueue}`,
  ]);
  // What it would put here itself needs the kernel's nft_queue, which is rarer; where that is there it judges twice.
  // What comes from the box, as probes do, is not forwarded: policies never apply to a pod's own node. A killed
  // server's last packets may count as INVALID: judged as if they began something they would be dropped, and its
  // clients learn nothing.
  const fresh = 'FORWARD --match conntrack --ctstate NEW';
  const rule = `--wait --table mangle --append ${fresh} --jump NFQUEUE --queue-num ${policyQueue}`;
  await box.run('iptables', ...rule.split(' '));
  await waitForPacketReader(box, policies, policyQueue);
  return policies;
}

function networkConfig(subnet: string): unknown {
  return {
    cniVersion: '0.4.0',
    name: 'pods',
    plugins: [
      {
        type: 'bridge',
        bridge: 'cni0',
        isGateway: true,
        ipMasq: false,
        hairpinMode: true,
        ipam: {
          type: 'host-local',
          dataDir: '/run/cni-addresses',
          ranges: [[{ subnet }]],
          routes: [{ dst: '0.0.0.0/0' }],
        },
      },
      { type: 'portmap', capabilities: { portMappings: true } },
    ],
  };
}

/** Its state is under the run's directory, not under /var: the overlay snapshotter wants a plain file system. */
function containerdConfig({ box, pauseImage }: NodeOptions): string {
  return `version = 2
root = "${join(box.directory, 'containerd')}"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "${runtimeSocket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "${pauseImage.name}"
  # Without CAP_SYS_RESOURCE runc may not lower oom_score_adj, and every sandbox would fail.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "${join(box.directory, 'cni')}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`;
}
