// The revision of a ModelService: a hash of what shapes its pods. Two specs of one revision give the same pods, so a
// change of scaling, rollout or drain replaces nothing, and going back to an earlier spec finds its groups again.

import { createHash } from 'node:crypto';

import { imageOf, type WorkerSettings } from './containers.ts';
import type { ModelServiceSpec } from '../resources/resources.ts';

/**
 * Eight hex digits. Fields that only affect the number of pods and their replacement are left out. The controller's
 * own additions to the pods are included, so that an upgrade of the cluster replaces the groups.
 */
export function revisionOf(spec: ModelServiceSpec, settings: WorkerSettings): string {
  const { model, tensorParallel, speculation, engine, resources, placement, template } = spec;
  const shape = { model, tensorParallel, speculation, engine, resources, placement, template };
  const { natsUrl, natsCredentialsSecret, cache, podDefaults } = settings;
  const accelerated = resources.accelerators > 0 ? podDefaults?.accelerated : undefined;
  const worker = { image: imageOf(spec, settings), natsUrl, natsCredentialsSecret, cache, accelerated };
  return hashOf({ ...shape, worker });
}

/**
 * Eight hex digits of what is prepared before groups exist: the checkpoint, its compilation, and the variables, which
 * may override both. A change is published again, so that gateways know what future groups compute.
 */
export function modelHashOf({ model, tensorParallel, template }: ModelServiceSpec): string {
  return hashOf({ model, tensorParallel, env: template.env });
}

function hashOf(shape: unknown): string {
  return createHash('sha256').update(canonicalJson(shape)).digest('hex').slice(0, 8);
}

/** JSON with the keys of every object in order, without absent values. */
function canonicalJson(value: unknown): string {
  if (Array.isArray(value)) {
    return `[${value.map(canonicalJson).join(',')}]`;
  }
  if (typeof value === 'object' && value !== null) {
    const entries = Object.entries(value)
      .filter(([, field]) => field !== undefined)
      .toSorted(([a], [b]) => (a < b ? -1 : 1));
    return `{${entries.map(([key, field]) => `${JSON.stringify(key)}:${canonicalJson(field)}`).join(',')}}`;
  }
  return JSON.stringify(value);
}
