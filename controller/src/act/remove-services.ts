// The image's other command, run before `helm uninstall`: deletes the namespace's ModelServices and waits until the
// controller, which still runs, has drained their groups and removed their finalizers. Afterwards nobody could. Its
// input is its arguments; it uses the pod's own service account, or --kubeconfig.

import { parseArgs } from 'node:util';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';

import { hasReason } from '../kube/api-status.ts';
import { KubeClient, loadKubeConfig } from '../kube/client.ts';
import { resourceTypes } from '../kube/resource.ts';

const pollMs = 500;

/** Resolves with their number once none is left; fails with `deadline_exceeded` and names those that remain. */
async function removeServices(client: KubeClient, signal: AbortSignal): Promise<number> {
  const type = resourceTypes.modelServices;
  const asked = new Set<string>();
  let left: readonly string[] = [];
  while (!signal.aborted) {
    try {
      const { items } = await client.list(type, {}, signal);
      left = items.map(({ metadata }) => metadata.name);
      if (left.length === 0) {
        return asked.size;
      }
      for (const { metadata } of items) {
        if (metadata.deletionTimestamp === undefined) {
          await client.delete(type, metadata.name, { uid: metadata.uid }, signal);
        }
        asked.add(metadata.name);
      }
    } catch (error) {
      // Gone meanwhile, or the API server is briefly unreachable; a rejection, however, would repeat.
      const known = ClusterError.from(error);
      if (!signal.aborted && !hasReason(error, 'NotFound') && known.code !== 'unavailable') {
        throw known;
      }
    }
    await pause(pollMs, signal);
  }
  throw new ClusterError(
    'deadline_exceeded',
    `still there: ${left.join(', ') || 'unknown'}. Is the controller running? kubectl describe modelservice shows what it waits for`,
  );
}

try {
  const { values } = parseArgs({
    options: {
      kubeconfig: { type: 'string' },
      namespace: { type: 'string' },
      'timeout-seconds': { type: 'string', default: '270' },
    },
  });
  const { kubeconfig, namespace } = values;
  const client = new KubeClient(loadKubeConfig(kubeconfig), namespace === undefined ? {} : { namespace });
  try {
    const timeout = AbortSignal.timeout(Number(values['timeout-seconds']) * 1_000);
    process.stdout.write(`removed ${await removeServices(client, timeout)} ModelServices\n`);
  } finally {
    client.close();
  }
} catch (error) {
  process.stderr.write(`remove-services: ${ClusterError.from(error).message}\n`);
  process.exitCode = 1;
}
