// A discrete-event cluster: a queue with late binding, replica groups that batch (a step takes longer the more rows it
// holds), start-up delays, drains and their costs. Policies return a count at fixed intervals. Deterministic.

import type { Trace, TraceRequest } from './traces.ts';

/** One group's engine: about an L4 with a 7B model in int8. */
export const groupModel = {
  slots: 16,
  stepMs: 25,
  stepMsPerRow: 1.2,
  prefillMsPerToken: 0.2,
} as const;

/** Engine milliseconds that one row costs in a full batch. */
const fullRowMs = groupModel.stepMs / groupModel.slots + groupModel.stepMsPerRow;

/** What a request takes of a full group, in milliseconds of the whole engine. */
export function engineMs(request: TraceRequest): number {
  return request.promptTokens * groupModel.prefillMsPerToken + request.completionTokens * fullRowMs;
}

/** A request's length in rows of a batch, its prompt included. */
function rowsOf(request: TraceRequest): number {
  return engineMs(request) / fullRowMs;
}

/** What a policy may see at a tick. Tokens are prompt plus permitted completion: what a queue knows. */
export interface ClusterView {
  readonly nowMs: number;
  readonly waitingRequests: number;
  readonly waitingTokens: number;
  readonly inFlightRequests: number;
  readonly inFlightTokens: number;
  readonly oldestWaitingMs: number;
  /** Since the beginning. */
  readonly arrivedTokens: number;
  readonly endedTokens: number;
  readonly readyGroups: number;
  readonly startingReadyInMs: readonly number[];
  readonly drainingGroups: number;
  /** Engine time over group time since the tick before, of ready groups: what a utilisation metric shows. */
  readonly busyRatio: number;
  readonly startUpMs: number;
}

/** A scaling policy with its memory. */
export interface Policy {
  readonly name: string;
  readonly tickMs: number;
  /** How long a removed group may finish what it holds; what is left then is lost. */
  readonly graceMs: number;
  wantedGroups(view: ClusterView): number;
}

export interface RunResult {
  readonly requests: number;
  /** Requests that began within the target wait and were finished. */
  readonly attainmentRatio: number;
  readonly replicaSeconds: number;
  readonly reversals: number;
  readonly lost: number;
  readonly waitP50Ms: number;
  readonly waitP99Ms: number;
  readonly maxGroups: number;
}

interface Group {
  state: 'starting' | 'ready' | 'draining';
  readyAtMs: number;
  killAtMs: number;
  /** Rows computed per sequence since the group began; sequences end at a value of it. */
  progress: number;
  updatedMs: number;
  busyMs: number;
  nextEndMs: number;
  readonly running: {
    readonly request: TraceRequest;
    readonly endProgress: number;
    readonly waitMs: number;
  }[];
}

function tokensOf(request: TraceRequest): number {
  return request.promptTokens + request.permittedTokens;
}

/** A request that waits longer has lost its client. */
const patienceMs = 600_000;

export interface RunOptions {
  readonly trace: Trace;
  readonly policy: Policy;
  readonly startUpMs: number;
  readonly targetWaitMs: number;
  readonly initialGroups: number;
  readonly maxGroups: number;
}

/** Runs one policy over one trace to its end and the last request. */
export function runCluster(options: RunOptions): RunResult {
  const { trace, policy, startUpMs, targetWaitMs, maxGroups } = options;
  const groups: Group[] = [];
  const queue: TraceRequest[] = [];
  let head = 0;
  let next = 0;
  let nowMs = 0;
  let tickMs = 0;
  let replicaMs = 0;
  let waitingTokens = 0;
  let inFlightRequests = 0;
  let inFlightTokens = 0;
  let arrivedTokens = 0;
  let endedTokens = 0;
  let lost = 0;
  let good = 0;
  let reversals = 0;
  let direction = 0;
  let wanted = options.initialGroups;
  let peak = 0;
  const waits: number[] = [];

  const addGroup = (readyAtMs: number): void => {
    groups.push({
      state: readyAtMs <= nowMs ? 'ready' : 'starting',
      readyAtMs,
      killAtMs: Infinity,
      progress: 0,
      updatedMs: nowMs,
      busyMs: 0,
      nextEndMs: Infinity,
      running: [],
    });
  };
  for (let index = 0; index < options.initialGroups; index++) {
    addGroup(0);
  }

  const msPerRow = (group: Group): number =>
    groupModel.stepMs + groupModel.stepMsPerRow * group.running.length;
  const advance = (group: Group): void => {
    if (group.running.length > 0) {
      group.progress += (nowMs - group.updatedMs) / msPerRow(group);
      group.busyMs += nowMs - group.updatedMs;
    }
    group.updatedMs = nowMs;
  };
  const planEnd = (group: Group): void => {
    let first = Infinity;
    for (const { endProgress } of group.running) {
      first = Math.min(first, endProgress);
    }
    group.nextEndMs =
      first === Infinity ? Infinity : nowMs + Math.max(0, first - group.progress) * msPerRow(group);
  };
  const leave = (request: TraceRequest): void => {
    inFlightRequests -= 1;
    inFlightTokens -= tokensOf(request);
  };

  const assign = (): void => {
    while (head < queue.length) {
      const request = queue[head] as TraceRequest;
      const waitMs = nowMs - request.arrivalMs;
      if (waitMs > patienceMs) {
        lost += 1;
        waits.push(waitMs);
      } else {
        let best: Group | undefined;
        for (const group of groups) {
          const free = group.state === 'ready' && group.running.length < groupModel.slots;
          if (free && (best === undefined || group.running.length < best.running.length)) {
            best = group;
          }
        }
        if (best === undefined) {
          return;
        }
        advance(best);
        best.running.push({ request, endProgress: best.progress + rowsOf(request), waitMs });
        planEnd(best);
        inFlightRequests += 1;
        inFlightTokens += tokensOf(request);
        waits.push(waitMs);
      }
      head += 1;
      waitingTokens -= tokensOf(request);
    }
  };

  const finish = (group: Group): void => {
    advance(group);
    for (let index = group.running.length - 1; index >= 0; index--) {
      const sequence = group.running[index];
      if (sequence !== undefined && sequence.endProgress <= group.progress + 1e-6) {
        group.running.splice(index, 1);
        leave(sequence.request);
        endedTokens += tokensOf(sequence.request);
        good += sequence.waitMs <= targetWaitMs ? 1 : 0;
      }
    }
    planEnd(group);
  };

  /** Drained groups go when empty or when their grace is over; then what they hold is lost. */
  const reap = (): void => {
    for (let index = groups.length - 1; index >= 0; index--) {
      const group = groups[index] as Group;
      if (group.state === 'draining' && (group.running.length === 0 || nowMs >= group.killAtMs)) {
        lost += group.running.length;
        for (const { request } of group.running) {
          leave(request);
        }
        groups.splice(index, 1);
      }
    }
  };

  const scaleTo = (count: number): void => {
    let difference = count - groups.filter((group) => group.state !== 'draining').length;
    for (const group of groups) {
      // A group that still drains is the quickest group to be had.
      if (difference > 0 && group.state === 'draining') {
        group.state = 'ready';
        group.killAtMs = Infinity;
        difference -= 1;
      }
    }
    for (; difference > 0; difference--) {
      addGroup(nowMs + startUpMs);
    }
    for (; difference < 0; difference++) {
      const victim = groups
        .filter((group) => group.state !== 'draining')
        .toSorted((a, b) => b.readyAtMs - a.readyAtMs)
        .toSorted((a, b) => a.running.length - b.running.length)
        .toSorted((a, b) => Number(a.state === 'ready') - Number(b.state === 'ready'))[0];
      if (victim === undefined) {
        return;
      }
      if (victim.state === 'starting') {
        groups.splice(groups.indexOf(victim), 1);
      } else {
        victim.state = 'draining';
        victim.killAtMs = nowMs + policy.graceMs;
      }
    }
  };

  const view = (): ClusterView => {
    const ready = groups.filter((group) => group.state === 'ready');
    for (const group of groups) {
      advance(group);
    }
    const busyMs = ready.reduce((sum, group) => sum + group.busyMs, 0);
    for (const group of groups) {
      group.busyMs = 0;
    }
    return {
      nowMs,
      waitingRequests: queue.length - head,
      waitingTokens,
      inFlightRequests,
      inFlightTokens,
      oldestWaitingMs: head < queue.length ? nowMs - (queue[head]?.arrivalMs ?? nowMs) : 0,
      arrivedTokens,
      endedTokens,
      readyGroups: ready.length,
      startingReadyInMs: groups
        .filter((group) => group.state === 'starting')
        .map((group) => group.readyAtMs - nowMs),
      drainingGroups: groups.length - groups.filter((group) => group.state !== 'draining').length,
      busyRatio: ready.length === 0 ? 0 : busyMs / (ready.length * policy.tickMs),
      startUpMs,
    };
  };

  while (true) {
    const arrivalMs = trace.requests[next]?.arrivalMs ?? Infinity;
    let eventMs = Math.min(arrivalMs, tickMs);
    for (const group of groups) {
      eventMs = Math.min(
        eventMs,
        group.nextEndMs,
        group.state === 'starting' ? group.readyAtMs : group.killAtMs,
      );
    }
    if (
      arrivalMs === Infinity &&
      nowMs >= trace.durationMs &&
      head === queue.length &&
      inFlightRequests === 0
    ) {
      break;
    }
    // Replicas are paid for while the trace lasts, so that no policy pays for a longer tail.
    replicaMs += groups.length * Math.max(0, Math.min(eventMs, trace.durationMs) - nowMs);
    nowMs = eventMs;
    if (arrivalMs === eventMs) {
      const request = trace.requests[next] as TraceRequest;
      queue.push(request);
      next += 1;
      waitingTokens += tokensOf(request);
      arrivedTokens += tokensOf(request);
    }
    for (const group of groups) {
      if (group.nextEndMs <= nowMs) {
        finish(group);
      }
      if (group.state === 'starting' && group.readyAtMs <= nowMs) {
        group.state = 'ready';
        group.updatedMs = nowMs;
      }
    }
    reap();
    if (tickMs === eventMs) {
      const before = wanted;
      wanted = Math.max(0, Math.min(maxGroups, policy.wantedGroups(view())));
      const change = Math.sign(wanted - before);
      reversals += change !== 0 && direction !== 0 && change !== direction ? 1 : 0;
      direction = change === 0 ? direction : change;
      scaleTo(wanted);
      reap();
      peak = Math.max(peak, groups.length);
      tickMs += policy.tickMs;
    }
    assign();
  }

  const sorted = waits.toSorted((a, b) => a - b);
  const quantile = (ratio: number): number =>
    sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * ratio))] ?? 0;
  return {
    requests: trace.requests.length,
    attainmentRatio: good / trace.requests.length,
    replicaSeconds: replicaMs / 1000,
    reversals,
    lost,
    waitP50Ms: quantile(0.5),
    waitP99Ms: quantile(0.99),
    maxGroups: peak,
  };
}
