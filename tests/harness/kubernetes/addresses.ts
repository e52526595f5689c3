// The addresses of a cluster of boxes: 198.18.0.0/15, the range for benchmarks, which is routed nowhere. They exist
// inside the namespaces only, so clusters of several runs never meet.

/** Of the control plane's box, which is the gateway of all others; 198.18.0.(1+i) is node i's, counted from 1. */
export const controlPlaneAddress = '198.18.0.1';
export const serviceRange = '198.19.0.0/16';
/** Always the first address of the range: the API server's own Service. */
export const apiServiceAddress = '198.19.0.1';
export const dnsServiceAddress = '198.19.0.10';
export const apiPort = 6443;
/** All pods of all nodes. */
export const podRange = '198.18.64.0/18';
export const clusterDomain = 'cluster.local';

/** The address of node `index`, counted from 1. */
export function nodeAddress(index: number): string {
  return `198.18.0.${1 + index}`;
}

/** The range of the pods of node `index`, counted from 1. */
export function nodePodRange(index: number): string {
  return `198.18.${64 + index}.0/24`;
}
