// The status of a ModelService, from its groups and the last decision. Pure. Each condition names the generation it was
// judged from, and its time changes only with its status. The words let `kubectl describe` answer "why not?".

import type { ModelService } from '../resources/resources.ts';
import type { Condition, ConditionType, ModelServiceStatus, ScaleDecision } from '../resources/status.ts';
import type { QueueReading } from './arrival-load.ts';
import { retryAtMs, type FailureMemory } from './failures.ts';
import type { ReplicaGroup } from './groups.ts';
import type { Preparation } from './prepare.ts';

export interface StatusInput {
  readonly service: ModelService;
  readonly revision: string;
  readonly groups: readonly ReplicaGroup[];
  readonly decision: ScaleDecision;
  readonly queue: QueueReading | 'unknown';
  readonly failures: FailureMemory;
  readonly preparation: Preparation;
  /** The status as observed. */
  readonly previous: ModelServiceStatus;
  readonly nowMs: number;
}

/** Shortest interval between writes of figures that change all the time. */
const figuresIntervalMs = 15_000;

type Judged = Pick<Condition, 'status' | 'reason' | 'message'>;

/** The status to write, or undefined if the observed one is up to date. */
export function planStatus(input: StatusInput): ModelServiceStatus | undefined {
  const { service, revision, groups, decision, queue, preparation, previous, nowMs } = input;
  const time = new Date(nowMs).toISOString();
  const judged: Readonly<Record<ConditionType, Judged>> = {
    ModelFound: preparation.condition,
    Ready: judgeReady(groups, decision, preparation),
    Progressing: judgeProgress(groups, decision, revision),
    ScalingActive:
      queue === 'unknown'
        ? { status: 'False', reason: 'QueueUnknown', message: 'the queue cannot be read: the count is held' }
        : { status: 'True', reason: 'QueueRead', message: 'the count follows the queue' },
    Degraded: judgeDegraded(input),
  };
  const conditions = Object.entries(judged).map(([type, found]): Condition => {
    const before = previous.conditions?.find((condition) => condition.type === type);
    const same = before?.status === found.status;
    return {
      type,
      ...found,
      observedGeneration: service.metadata.generation,
      lastTransitionTime: same ? before.lastTransitionTime : time,
    };
  });
  const living = groups.filter(({ state }) => state !== 'ending');
  const status: ModelServiceStatus = {
    observedGeneration: service.metadata.generation,
    conditions,
    replicas: living.length,
    selector: `mimo-cluster.dev/service=${service.metadata.name}`,
    revision,
    ...(preparation.preparedModel === undefined ? {} : { preparedModel: preparation.preparedModel }),
    groups: {
      wanted: decision.wanted,
      ready: living.filter(({ state }) => state === 'ready').length,
      updated: living.filter((group) => group.revision === revision).length,
      draining: living.filter(({ state }) => state === 'draining').length,
    },
    queue:
      queue === 'unknown'
        ? {}
        : {
            waitingRequests: queue.waitingRequests,
            waitingTokens: Math.round(queue.waitingTokens),
            oldestWaitingSeconds: Math.round(queue.oldestWaitingMs / 1000),
          },
    lastDecision: { ...decision, time },
  };
  const written = Date.parse(previous.lastDecision?.time ?? '');
  const figuresDue = !(nowMs - written < figuresIntervalMs);
  const changed = JSON.stringify(essenceOf(status)) !== JSON.stringify(essenceOf(previous));
  const figures = JSON.stringify(figuresOf(status)) !== JSON.stringify(figuresOf(previous));
  return changed || (figures && figuresDue) ? status : undefined;
}

/** The part that is written as soon as it changes. */
function essenceOf({
  lastDecision,
  observedGeneration,
  conditions,
  replicas,
  revision,
  preparedModel,
  groups,
}: ModelServiceStatus): unknown {
  return {
    observedGeneration,
    conditions: conditions?.map(({ type, status, reason, message }) => [type, status, reason, message]),
    replicas,
    revision,
    preparedModel,
    groups: [groups?.wanted, groups?.ready, groups?.updated, groups?.draining],
    decision: [lastDecision?.wanted, lastDecision?.reason, lastDecision?.blocker],
  };
}

/** The part that is written from time to time. */
function figuresOf({ queue, lastDecision }: ModelServiceStatus): unknown {
  const { waitingRequests, waitingTokens, oldestWaitingSeconds } = queue ?? {};
  return [waitingRequests, waitingTokens, oldestWaitingSeconds, lastDecision?.formula];
}

function judgeReady(
  groups: readonly ReplicaGroup[],
  decision: ScaleDecision,
  { found, condition }: Preparation,
): Judged {
  const ready = groups.filter(({ state }) => state === 'ready').length;
  if (ready > 0) {
    return {
      status: 'True',
      reason: 'GroupsReady',
      message: `${ready} of ${decision.wanted} groups are ready`,
    };
  }
  if (!found) {
    return { status: 'False', reason: `Model${condition.reason}`, message: condition.message };
  }
  if (decision.wanted === 0) {
    return { status: 'True', reason: 'AtZero', message: 'no group is needed; the next request starts one' };
  }
  return {
    status: 'False',
    reason: 'NoGroupReady',
    message: `none of ${decision.wanted} groups is ready yet`,
  };
}

function judgeProgress(groups: readonly ReplicaGroup[], decision: ScaleDecision, revision: string): Judged {
  const active = groups.filter(({ state }) => state === 'starting' || state === 'ready');
  const old = active.filter((group) => group.revision !== revision).length;
  const ready = active.filter((group) => group.revision === revision && group.ready).length;
  if (old > 0) {
    return {
      status: 'True',
      reason: 'RollingOut',
      message: `${ready} of ${decision.wanted} groups of revision ${revision} are ready, ${old} of earlier revisions remain`,
    };
  }
  if (ready !== decision.wanted || active.length !== decision.wanted) {
    return { status: 'True', reason: 'Scaling', message: `${ready} of ${decision.wanted} groups are ready` };
  }
  return { status: 'False', reason: 'Complete', message: `all groups have revision ${revision}` };
}

function judgeDegraded({ groups, decision, failures, nowMs }: StatusInput): Judged {
  if (failures.count >= 2) {
    const words =
      groups.find(({ failure }) => failure !== undefined)?.failure ?? 'see the events of the pods';
    const waitMs = retryAtMs(failures) - nowMs;
    const next =
      waitMs > 0 ? `tried again ${new Date(retryAtMs(failures)).toISOString()}` : 'being tried again';
    return {
      status: 'True',
      reason: 'GroupsFail',
      message: `${failures.count} groups of revision ${failures.revision} failed, ${next}: ${words}`,
    };
  }
  if (decision.blocker !== undefined) {
    return { status: 'True', reason: 'Blocked', message: decision.blocker };
  }
  return { status: 'False', reason: 'AsExpected', message: 'no failures' };
}
