// Observed pods -> replica groups and their states. Pure. A group is a whole: if one rank is lost it is broken, and
// its other ranks are useless. Independent of the spec.

/** One pod: its labels, its state, and the dispatcher's report on its group. */
export interface ObservedPod {
  readonly name: string;
  readonly uid: string;
  readonly group: string;
  readonly revision: string;
  readonly index: number;
  readonly rank: number;
  /** Number of pods of its group, from its label: another revision may have another size. */
  readonly groupPods: number;
  readonly phase: 'Pending' | 'Running' | 'Succeeded' | 'Failed';
  /** The Ready condition, readiness gate included: the dispatcher holds a live channel to the whole group. */
  readonly ready: boolean;
  readonly deleting: boolean;
  readonly createdMs: number;
  /** The drain mark, set by the controller. */
  readonly drainingSinceMs: number | undefined;
  /** The scheduler's message if the pod cannot be placed. */
  readonly blocker: string | undefined;
  /** The last message of a failed container, and when the controller saw it. */
  readonly failure: string | undefined;
  readonly failedMs: number | undefined;
  /** The current readiness gate: whether the dispatcher last reported that it reaches the whole group. */
  readonly routable: boolean;
}

/** Names one pod and no later one of that name. */
export interface PodRef {
  readonly name: string;
  readonly uid: string;
}

/** The dispatcher's report on a group; absent if it does not know the group. */
export interface GroupLoad {
  /** The dispatcher holds a live channel to the whole group. */
  readonly routable: boolean;
  /** The dispatcher has seen the drain mark: the group gets no new requests. */
  readonly draining: boolean;
  readonly inFlightRequests: number;
  readonly inFlightTokens: number;
  /** Requests wait that only groups with this model identity may run, and those groups are full. */
  readonly waitedFor?: boolean;
}

/**
 * starting: complete, not ready yet; ready: serves; draining: gets no new requests; broken: a rank is missing,
 * finished or being deleted while others exist; ending: every pod is being deleted.
 */
export type GroupState = 'starting' | 'ready' | 'draining' | 'broken' | 'ending';

export interface ReplicaGroup {
  readonly name: string;
  readonly revision: string;
  readonly index: number;
  readonly state: GroupState;
  readonly ready: boolean;
  readonly pods: readonly ObservedPod[];
  readonly createdMs: number;
  readonly drainingSinceMs: number | undefined;
  readonly blocker: string | undefined;
  readonly failure: string | undefined;
  readonly load: GroupLoad | undefined;
}

/** Whether it can run requests: it is ready, or the dispatcher already reaches it, which makes it ready soon. */
export function isServing({ state, load }: ReplicaGroup): boolean {
  return state === 'ready' || (state === 'starting' && load?.routable === true);
}

/** Groups in order of name; each pod is in exactly one. */
export function groupsFromPods(
  pods: readonly ObservedPod[],
  loads: ReadonlyMap<string, GroupLoad>,
): readonly ReplicaGroup[] {
  return [...Map.groupBy(pods, ({ group }) => group)]
    .toSorted(([a], [b]) => (a < b ? -1 : 1))
    .map(([name, unsorted]) => {
      const members = unsorted.toSorted((a, b) => a.rank - b.rank);
      const first = members[0] as ObservedPod;
      const drainingSinceMs = members.find((pod) => pod.drainingSinceMs !== undefined)?.drainingSinceMs;
      const ready = members.length === first.groupPods && members.every((pod) => pod.ready);
      return {
        name,
        revision: first.revision,
        index: first.index,
        state: stateOf(members, ready, drainingSinceMs !== undefined),
        ready,
        pods: members,
        createdMs: Math.min(...members.map(({ createdMs }) => createdMs)),
        drainingSinceMs,
        blocker: members.find(({ blocker }) => blocker !== undefined)?.blocker,
        failure: firstFailure(members),
        load: loads.get(name),
      };
    });
}

function stateOf(pods: readonly ObservedPod[], ready: boolean, draining: boolean): GroupState {
  if (pods.every(({ deleting }) => deleting)) {
    return 'ending';
  }
  const over = pods.some(({ phase, deleting }) => deleting || phase === 'Failed' || phase === 'Succeeded');
  const ranks = new Set(pods.map(({ rank }) => rank)).size;
  if (over || ranks !== pods[0]?.groupPods) {
    return 'broken';
  }
  if (draining) {
    return 'draining';
  }
  return ready ? 'ready' : 'starting';
}

/** The message of the pod that failed first: the group's other pods fail because of it. */
function firstFailure(pods: readonly ObservedPod[]): string | undefined {
  const failed = pods.filter(({ failure }) => failure !== undefined);
  return failed.toSorted((a, b) => (a.failedMs ?? 0) - (b.failedMs ?? 0))[0]?.failure;
}
