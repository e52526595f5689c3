// What is remembered of a ModelService between its rounds, in memory only: after a restart it begins with what the
// status and the pods say.

import type { Refusal } from './act/act-in-order.ts';
import { Expectations, isAtLeast } from './act/expectations.ts';
import { createScaleMemory, type ScaleMemory } from './decide/autoscale.ts';
import { noDisruption, type DisruptionMemory } from './decide/disruption.ts';
import { noFailures, type FailureMemory } from './decide/failures.ts';
import type { ReplicaGroup } from './decide/groups.ts';
import { noPreparation, type PrepareMemory } from './decide/prepare.ts';
import { noStartUp, type StartUpMemory } from './decide/start-up.ts';
import type { ServiceRecord } from './observe/records.ts';
import type { ModelServiceStatus } from './resources/status.ts';

/** The memory of one service, by its uid. A round changes it. */
export interface ServiceMemory {
  readonly uid: string;
  readonly expectations: Expectations;
  scale: ScaleMemory;
  failures: FailureMemory;
  preparation: PrepareMemory;
  startUp: StartUpMemory;
  disruption: DisruptionMemory;
  /** Our last write of the service, until the watch shows one as new. */
  written: { readonly resourceVersion: string; readonly status: ModelServiceStatus } | undefined;
  refused: Refusal | undefined;
  queueKnown: boolean;
  modelCondition: string;
}

/** A memory that knows no earlier round. */
export function createServiceMemory(
  { metadata, status }: ServiceRecord,
  groups: readonly ReplicaGroup[],
  nowMs: number,
): ServiceMemory {
  const living = groups.filter(({ state }) => state === 'starting' || state === 'ready').length;
  return {
    uid: metadata.uid,
    expectations: new Expectations(),
    scale: createScaleMemory(status.groups?.wanted ?? living, nowMs),
    failures: noFailures,
    preparation: noPreparation,
    startUp: noStartUp,
    disruption: noDisruption,
    written: undefined,
    refused: undefined,
    queueKnown: false,
    modelCondition: modelConditionOf(status),
  };
}

/** The latest known status: our own last write may be newer than what the watch shows. */
export function latestStatus(memory: ServiceMemory, { metadata, status }: ServiceRecord): ModelServiceStatus {
  if (memory.written === undefined) {
    return status;
  }
  if (isAtLeast(metadata.resourceVersion, memory.written.resourceVersion)) {
    memory.written = undefined;
    return status;
  }
  return memory.written.status;
}

function modelConditionOf({ conditions }: ModelServiceStatus): string {
  const found = conditions?.find(({ type }) => type === 'ModelFound');
  return found === undefined ? '' : `${found.status} ${found.reason}`;
}
