// Our chart through the real helm: rendered to objects, or against an API server. Owns the calls and the parsing of
// their output; has no values.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';

import { ClusterError } from '@mimo/core/process/errors';
import { parseAllDocuments } from 'yaml';

/** The chart that is installed. */
export const chartDirectory = join(import.meta.dirname, '../../../charts/mimo-cluster');

/** A Kubernetes object as the chart renders it. */
export interface KubernetesObject {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: {
    readonly name: string;
    readonly namespace?: string;
    readonly labels?: Readonly<Record<string, string>>;
    readonly annotations?: Readonly<Record<string, string>>;
  };
  readonly [field: string]: unknown;
}

/** What a chart's user sets; helm merges it over the chart's defaults. */
export type Values = Readonly<Record<string, unknown>>;

/**
 * Runs helm with `values`, if any, as its last values file; gives its output. Fails with `failed_precondition` and
 * helm's own words.
 */
export async function runHelm(
  helm: string,
  args: readonly string[],
  options: { readonly values?: Values | undefined; readonly env?: NodeJS.ProcessEnv } = {},
): Promise<string> {
  const { values, env = {} } = options;
  const child = spawn(helm, [...args, ...(values === undefined ? [] : ['--values', '-'])], {
    // Nobody's own repositories, plugins and cluster.
    env: { PATH: process.env['PATH'], HOME: '/nonexistent', HELM_PLUGINS: '/nonexistent', ...env },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  child.stdin.end(values === undefined ? '' : JSON.stringify(values));
  const [output, words, [code]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, 'close') as Promise<[number | null]>,
  ]);
  if (code !== 0) {
    throw new ClusterError('failed_precondition', `helm ${args.join(' ')} (${code}):\n${words}${output}`);
  }
  return output;
}

/** Renders the chart as release `mimo` in namespace `serving`, the hooks too. */
export async function renderChart(
  helm: string,
  values: Values = {},
  args: readonly string[] = [],
): Promise<readonly KubernetesObject[]> {
  const output = await runHelm(
    helm,
    ['template', 'mimo', chartDirectory, '--namespace', 'serving', ...args],
    { values },
  );
  return parseAllDocuments(output)
    .map((document) => {
      const [problem] = document.errors;
      if (problem !== undefined) {
        throw new ClusterError('invalid_argument', `the chart renders YAML that is none: ${problem.message}`);
      }
      return document.toJSON() as KubernetesObject | null;
    })
    .filter((object) => object !== null);
}

/** The one object of that kind and name. */
export function objectOf(objects: readonly KubernetesObject[], kind: string, name: string): KubernetesObject {
  const [found, ...others] = objects.filter(
    (object) => object.kind === kind && object.metadata.name === name,
  );
  if (found === undefined || others.length > 0) {
    const names = objects.map((object) => `${object.kind}/${object.metadata.name}`).join(', ');
    throw new ClusterError('not_found', `not exactly one object is ${kind}/${name}; there are ${names}`);
  }
  return found;
}

export interface Container {
  readonly name: string;
  readonly image: string;
  readonly env?: readonly {
    readonly name: string;
    readonly value?: string;
    readonly valueFrom?: { readonly fieldRef?: { readonly fieldPath: string } };
  }[];
  readonly [field: string]: unknown;
}

/** The part of a pod that tests look at. */
interface PodSpec {
  readonly containers: readonly Container[];
  readonly initContainers?: readonly Container[];
  readonly volumes?: readonly Readonly<Record<string, unknown>>[];
  readonly [field: string]: unknown;
}

/** A pod that an object is or makes, with its labels. */
export interface PodTemplate {
  readonly owner: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly spec: PodSpec;
}

/** The pods of rendered objects. */
export function podsOf(objects: readonly KubernetesObject[]): readonly PodTemplate[] {
  return objects.flatMap((object) => {
    const owner = `${object.kind}/${object.metadata.name}`;
    if (object.kind === 'Pod') {
      return [{ owner, labels: object.metadata.labels ?? {}, spec: object['spec'] as PodSpec }];
    }
    const { template } = (object['spec'] ?? {}) as {
      template?: { metadata?: { labels?: Record<string, string> }; spec?: PodSpec };
    };
    return template?.spec?.containers === undefined
      ? []
      : [{ owner, labels: template.metadata?.labels ?? {}, spec: template.spec }];
  });
}

/** A container's environment as its process sees it, fields of the pod replaced by something. */
export function environmentOf({ env = [] }: Container): Readonly<Record<string, string>> {
  return Object.fromEntries(
    env.map(({ name, value, valueFrom }) => [
      name,
      value ?? `<${valueFrom?.fieldRef?.fieldPath ?? 'secret'}>`,
    ]),
  );
}
