// The arms of the autoscaling benchmark: the production rule and six others, written from their published formulas and
// defaults. Where a default has no meaning here (KubeAI's 100 requests a replica, Knative's 100 per pod) it is set to
// what the group holds, which is in the rival's favour; all arms share one queue with late binding, which only ours
// has.

import { createScaleMemory, decideScale } from '@mimo/controller/decide/autoscale';
import type { ScalingSpec } from '@mimo/controller/resources/resources';

import { groupModel, type ClusterView, type Policy } from './cluster.ts';

const slots = groupModel.slots;

/** Limits that every arm gets. */
export interface PolicyLimits {
  readonly maxGroups: number;
  readonly targetWaitMs: number;
  readonly initialGroups: number;
}

const clamp = (value: number, min: number, max: number): number => Math.max(min, Math.min(max, value));

/** The last `lengthMs` of a value sampled at ticks. */
function createWindow(lengthMs: number): {
  add(nowMs: number, value: number): void;
  mean(): number;
  max(): number;
} {
  let samples: { atMs: number; value: number }[] = [];
  return {
    add: (nowMs, value) => {
      samples.push({ atMs: nowMs, value });
      samples = samples.filter(({ atMs }) => atMs > nowMs - lengthMs);
    },
    mean: () => samples.reduce((sum, { value }) => sum + value, 0) / samples.length,
    max: () => samples.reduce((most, { value }) => Math.max(most, value), 0),
  };
}

const existing = (view: ClusterView): number => view.readyGroups + view.startingReadyInMs.length;
const requests = (view: ClusterView): number => view.waitingRequests + view.inFlightRequests;

/** The production decision code, every two seconds, with a first guess of the speed that is wrong on purpose. */
export function createProduction({ maxGroups, targetWaitMs, initialGroups }: PolicyLimits): Policy {
  const spec: ScalingSpec = {
    min: 0,
    max: maxGroups,
    targetWaitSeconds: targetWaitMs / 1000,
    groupTokensPerSecond: 2000,
    startUpSeconds: 60,
    scaleToZeroAfterSeconds: 300,
  };
  let memory = createScaleMemory(initialGroups, 0);
  return {
    name: 'ours',
    tickMs: 2000,
    graceMs: Infinity,
    wantedGroups: (view) => {
      const queue = { ...view, slots: view.readyGroups * slots, countersEpoch: 1 };
      const result = decideScale(spec, { ...view, queue }, memory, view.nowMs);
      memory = result.memory;
      return result.decision.wanted;
    },
  };
}

/**
 * (waiting + in flight) / (speed T) and nothing else, with the true speed: what the rule was before it was measured.
 */
export function createPlainTokens({ maxGroups, targetWaitMs }: PolicyLimits, speed: number): Policy {
  const recent = createWindow(300_000);
  return {
    name: 'plain token rule',
    tickMs: 2000,
    graceMs: Infinity,
    wantedGroups: (view) => {
      const tokens = view.waitingTokens + view.inFlightTokens;
      const wanted = Math.ceil(tokens / ((speed * targetWaitMs) / 1000));
      recent.add(view.nowMs, wanted);
      // Down by one a decision, to the most that was wanted within five minutes.
      return clamp(Math.max(recent.max(), Math.min(existing(view) - 1, maxGroups), wanted), 0, maxGroups);
    },
  };
}

export function createStatic(groups: number): Policy {
  return { name: 'static peak', tickMs: 60_000, graceMs: Infinity, wantedGroups: () => groups };
}

/**
 * What the HorizontalPodAutoscaler does with a raw recommendation: up by max(+100 %, +4) a sync, down by the 300 s
 * maximum.
 */
function createHpaBehaviour(maxGroups: number): (view: ClusterView, raw: number) => number {
  const down = createWindow(300_000);
  return (view, raw) => {
    const current = existing(view);
    down.add(view.nowMs, raw);
    const upLimit = Math.max(current * 2, current + 4);
    const stabilised = raw > current ? Math.min(raw, upLimit) : Math.min(current, down.max());
    return clamp(stabilised, 1, maxGroups);
  };
}

/** HPA on utilisation, target 70 %, tolerance 10 %, sync 15 s; starting groups count as 0 % on the way up. */
export function createHpaOnCpu({ maxGroups }: PolicyLimits): Policy {
  const behave = createHpaBehaviour(maxGroups);
  return {
    name: 'HPA on CPU',
    tickMs: 15_000,
    graceMs: 30_000,
    wantedGroups: (view) => {
      const current = existing(view);
      const ratio = view.busyRatio / 0.7;
      const withStarting = current === 0 ? 0 : (view.busyRatio * view.readyGroups) / (current * 0.7);
      const usage = ratio > 1 ? Math.max(1, withStarting) : ratio;
      const raw = Math.abs(usage - 1) <= 0.1 ? current : Math.ceil(current * usage);
      return behave(view, raw);
    },
  };
}

/**
 * KEDA's nats-jetstream scaler: pending plus unacknowledged over 10, through HPA; polls every 30 s, zero after 300 s.
 */
export function createKeda({ maxGroups }: PolicyLimits): Policy {
  const behave = createHpaBehaviour(maxGroups);
  let lastActiveMs = 0;
  return {
    name: 'KEDA + HPA',
    tickMs: 15_000,
    graceMs: 30_000,
    wantedGroups: (view) => {
      const lag = requests(view);
      const polled = view.nowMs % 30_000 === 0;
      lastActiveMs = lag > 0 && polled ? view.nowMs : lastActiveMs;
      const current = existing(view);
      if (current === 0) {
        return lag > 0 && polled ? 1 : 0;
      }
      if (lag === 0 && view.nowMs - lastActiveMs >= 300_000) {
        return 0;
      }
      const usage = lag / 10 / current;
      return behave(view, Math.abs(usage - 1) <= 0.1 ? current : Math.ceil(lag / 10));
    },
  };
}

/** Knative's KPA: 70 % of the slots, 60 s stable and 6 s panic windows, panic at twice the ready capacity for 60 s. */
export function createKnative({ maxGroups }: PolicyLimits): Policy {
  const stable = createWindow(60_000);
  const panic = createWindow(6000);
  const target = 0.7 * slots;
  let panicUntilMs = -Infinity;
  let panicGroups = 0;
  let zeroSinceMs = Infinity;
  return {
    name: 'Knative KPA',
    tickMs: 2000,
    graceMs: 300_000,
    wantedGroups: (view) => {
      stable.add(view.nowMs, requests(view));
      panic.add(view.nowMs, requests(view));
      const ready = Math.max(1, view.readyGroups);
      const bounded = (value: number): number => clamp(value, Math.floor(view.readyGroups / 2), 1000 * ready);
      const wantStable = bounded(Math.ceil(stable.mean() / target));
      const wantPanic = bounded(Math.ceil(panic.mean() / target));
      if (wantPanic / ready >= 2) {
        panicUntilMs = view.nowMs + 60_000;
      }
      let wanted = wantStable;
      if (view.nowMs < panicUntilMs) {
        panicGroups = Math.max(panicGroups, wantPanic, existing(view));
        wanted = panicGroups;
      } else {
        panicGroups = 0;
      }
      zeroSinceMs = wanted > 0 ? Infinity : Math.min(zeroSinceMs, view.nowMs);
      if (wanted === 0 && view.nowMs - zeroSinceMs < 30_000 && existing(view) > 0) {
        wanted = 1;
      }
      return clamp(wanted, 0, maxGroups);
    },
  };
}

/**
 * KubeAI: every 10 s the mean of ten minutes over what a replica holds; down after three votes; 0 to 1 at once; no
 * drain.
 */
export function createKubeAi({ maxGroups }: PolicyLimits): Policy {
  const window = createWindow(600_000);
  let votes = 0;
  let nextMs = 0;
  return {
    name: 'KubeAI average',
    tickMs: 1000,
    graceMs: 0,
    wantedGroups: (view) => {
      const current = existing(view);
      if (current === 0 && requests(view) > 0) {
        return 1;
      }
      if (view.nowMs < nextMs) {
        return current;
      }
      nextMs = view.nowMs + 10_000;
      window.add(view.nowMs, requests(view));
      const wanted = clamp(Math.ceil(window.mean() / slots), 0, maxGroups);
      votes = wanted < current ? votes + 1 : 0;
      return wanted < current && votes < 3 ? current : wanted;
    },
  };
}

/**
 * One up when all slots are taken, one down below 40 %, every 5 s, and only while nothing starts (Dynamo's load loop).
 */
export function createPlusMinusOne({ maxGroups }: PolicyLimits): Policy {
  return {
    name: '±1 rule',
    tickMs: 5000,
    graceMs: Infinity,
    wantedGroups: (view) => {
      const current = existing(view);
      if (view.startingReadyInMs.length > 0 || view.readyGroups === 0) {
        return clamp(current, 1, maxGroups);
      }
      const used = requests(view) / (view.readyGroups * slots);
      return clamp(current + (used > 1 ? 1 : used < 0.4 ? -1 : 0), 1, maxGroups);
    },
  };
}
