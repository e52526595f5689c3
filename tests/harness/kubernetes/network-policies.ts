// The flows between pods that NetworkPolicies allow, by the rules of the API's documentation: a pod that no policy of a
// direction selects is open in it, else some rule must allow the flow, and both ends must agree. Pure.

import type { KubernetesObject } from './helm.ts';

type LabelMap = Readonly<Record<string, string>>;

interface Selector {
  readonly matchLabels?: LabelMap;
  readonly matchExpressions?: readonly {
    readonly key: string;
    readonly operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
    readonly values?: readonly string[];
  }[];
}

interface Peer {
  readonly podSelector?: Selector;
  readonly namespaceSelector?: Selector;
  readonly ipBlock?: { readonly cidr: string };
}

interface Port {
  readonly port: number;
  readonly endPort?: number;
  readonly protocol: string;
}

interface Rule {
  readonly from?: readonly Peer[];
  readonly to?: readonly Peer[];
  readonly ports?: readonly Port[];
}

interface Policy {
  readonly podSelector: Selector;
  readonly policyTypes: readonly ('Ingress' | 'Egress')[];
  readonly ingress?: readonly Rule[];
  readonly egress?: readonly Rule[];
}

/** One end of a flow: a pod with its labels and namespace, or an address outside the cluster. */
export interface Endpoint {
  readonly labels?: LabelMap;
  /** Its namespace; a namespace's own labels are its name alone. */
  readonly namespace?: string;
  readonly address?: string;
}

export interface Flow {
  readonly from: Endpoint;
  readonly to: Endpoint;
  readonly port: number;
  readonly protocol?: 'TCP' | 'UDP';
}

/** Whether the policies among `objects` let a flow through. */
export function isAllowed(objects: readonly KubernetesObject[], flow: Flow): boolean {
  return (
    isAllowedIn(objects, 'Egress', flow.from, flow.to, flow) &&
    isAllowedIn(objects, 'Ingress', flow.to, flow.from, flow)
  );
}

function isAllowedIn(
  objects: readonly KubernetesObject[],
  direction: 'Ingress' | 'Egress',
  self: Endpoint,
  other: Endpoint,
  flow: Flow,
): boolean {
  const policies = objects
    .filter((object) => object.kind === 'NetworkPolicy' && object.metadata.namespace === self.namespace)
    .map((object) => ({ namespace: object.metadata.namespace, spec: object['spec'] as Policy }))
    .filter(({ spec }) => spec.policyTypes.includes(direction) && matches(spec.podSelector, self.labels));
  if (policies.length === 0) {
    return true;
  }
  return policies.some(({ namespace, spec }) => {
    const rules = (direction === 'Ingress' ? spec.ingress : spec.egress) ?? [];
    return rules.some((rule) => {
      const peers = (direction === 'Ingress' ? rule.from : rule.to) ?? [];
      return (
        (peers.length === 0 || peers.some((peer) => isPeer(peer, other, namespace))) &&
        hasPort(rule.ports ?? [], flow)
      );
    });
  });
}

function hasPort(ports: readonly Port[], { port, protocol = 'TCP' }: Flow): boolean {
  return (
    ports.length === 0 ||
    ports.some((allowed) => {
      const last = allowed.endPort ?? allowed.port;
      return allowed.protocol === protocol && port >= allowed.port && port <= last;
    })
  );
}

function isPeer(peer: Peer, end: Endpoint, namespaceOfPolicy: string | undefined): boolean {
  if (peer.ipBlock !== undefined) {
    // Tests name whole networks: comparing the text is enough.
    return end.address !== undefined && peer.ipBlock.cidr === `${end.address}/32`;
  }
  if (end.namespace === undefined) {
    return false;
  }
  const inNamespace =
    peer.namespaceSelector === undefined
      ? end.namespace === namespaceOfPolicy
      : matches(peer.namespaceSelector, { 'kubernetes.io/metadata.name': end.namespace });
  return inNamespace && (peer.podSelector === undefined || matches(peer.podSelector, end.labels));
}

function matches(
  { matchLabels = {}, matchExpressions = [] }: Selector,
  labels: LabelMap | undefined = {},
): boolean {
  return (
    Object.entries(matchLabels).every(([key, value]) => labels[key] === value) &&
    matchExpressions.every(({ key, operator, values = [] }) => {
      const value = labels[key];
      const isIn = value !== undefined && values.includes(value);
      return { In: isIn, NotIn: !isIn, Exists: value !== undefined, DoesNotExist: value === undefined }[
        operator
      ];
    })
  );
}
