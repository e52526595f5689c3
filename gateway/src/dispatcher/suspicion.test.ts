// The rule alone, and then the rule at work: a simulation of gateways' requests, a dispatcher's state and plans, and
// groups that requests break, on a simulated clock.

import { join } from 'node:path';

import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { summaryOf } from '@mimo/core/bus/records';
import { AssignmentOutcome, Company, RequestRecord, type RequestEnded } from '@mimo/proto/queue';
import { FinishKind, GroupState, Heartbeat, SequenceDelta, type Submit } from '@mimo/proto/worker';
import { loadTokenizer } from '@mimo/tokenizer';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { DispatchState } from './dispatch-state.ts';
import { planAssignments } from './placement.ts';
import { Groups } from './groups.ts';
import type { GatewayMetrics } from '../metrics.ts';
import { Requests } from '../requests.ts';
import type { SequenceListener, Session, Sessions } from '../session.ts';
import {
  companyFor,
  isGuilty,
  patienceMs,
  provenTokens,
  suspicionAfter,
  unsuspected,
  type Suspicion,
} from './suspicion.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../../models/mimo-demo'));
const log = createLog({ process: 'test', level: 'silent' });

function broken(...alone: readonly boolean[]): Suspicion {
  return alone.reduce(
    (before, each) => suspicionAfter(before, { broke: true, tokens: 7, alone: each }),
    unsuspected,
  );
}

describe('suspicion', () => {
  it('restricts company further with each break, and finds guilty a request alone in its third break or later', () => {
    expect(
      [broken(), broken(false), broken(false, false), broken(false, false, false)].map(companyFor),
    ).toEqual([Company.UNSPECIFIED, Company.UNSPECIFIED, Company.PROVEN, Company.NONE]);
    expect(isGuilty(broken(false, false, true))).toBe(true);
    expect(isGuilty(broken(false, false, false, true))).toBe(true);
    expect(isGuilty(broken(true, true))).toBe(false);
    expect(isGuilty(broken(true, true, false))).toBe(false);
  });

  it('is cleared by progress, and unchanged by a group that rejects or hands over', () => {
    const suspect = broken(false, false);
    expect(suspicionAfter(suspect, { broke: true, tokens: provenTokens, alone: true })).toEqual(unsuspected);
    expect(suspicionAfter(suspect, { broke: false, tokens: 0, alone: true })).toEqual(suspect);
  });
});

type Kind = 'innocent' | 'crashes' | 'hangs' | 'crashes late';

/** One request of a schedule. */
interface Scheduled {
  readonly kind: Kind;
  readonly gateway: number;
  readonly arrivesAt: number;
  /** Its tokens in total; for a poison, the tokens that it gets in a group before it breaks the group. */
  readonly tokens: number;
  /** Ticks from its breaking or stopping a group until its client leaves; 0: the client stays. */
  readonly leavesAfter: number;
}

interface Member {
  readonly requestId: string;
  readonly submit: Omit<Submit, 'slot'>;
  readonly listener: SequenceListener;
  tokens: number;
  aborted: boolean;
}

interface Schedule {
  readonly requests: readonly Scheduled[];
  readonly groups: number;
  readonly slots: number;
  /** How many of eight ended attempts are not reported to the dispatcher. */
  readonly lostWords: number;
  /** Ticks for which a group stalls, and then until its next incarnation. */
  readonly hangsFor: number;
  readonly awayFor: number;
  /** Ticks after which another gateway takes over dispatching; 0: never. */
  readonly termTicks: number;
  /** An endless stream of innocent requests. */
  readonly traffic?: { readonly everyTicks: number; readonly tokens: number };
}

const tickMs = 50;
const beatTicks = 5;
/** Ticks until the dispatcher is sure of a group's requests. */
const settleTicks = 2_000 / tickMs;
const maxTicks = 40_000;
const mostBreaks = 7;

/** A simulated group: a step adds a token to each sequence, or breaks the group. */
class Group {
  readonly name: string;
  readonly #world: World;
  members: Member[] = [];
  #life = 1;
  /** The request that broke it last. */
  #breaker = '';
  /** While it stalls: when it breaks. While it is gone: when it returns. */
  breaksAt: number | undefined;
  backAt: number | undefined;

  constructor(name: string, world: World) {
    this.name = name;
    this.#world = world;
  }

  get incarnation(): string {
    return `${this.name}-${this.#life}`;
  }

  heartbeat(): Heartbeat {
    return Heartbeat.fromPartial({
      model: 'm',
      group: this.name,
      incarnation: this.incarnation,
      state: GroupState.READY,
      sequenceNumber: this.#world.tick + 1,
      maxSequences: this.#world.schedule.slots,
      runningSequences: this.members.length,
      running: this.members.map(({ requestId, submit, tokens }) => ({
        requestId,
        epoch: submit.epoch,
        tokens,
        onTrial: submit.onTrial,
      })),
    });
  }

  step(): void {
    const { tick, schedule } = this.#world;
    if (this.backAt !== undefined) {
      if (tick >= this.backAt) {
        this.backAt = undefined;
        this.#life += 1;
      }
      return;
    }
    if (this.breaksAt !== undefined) {
      if (tick >= this.breaksAt) {
        this.#break();
      }
      return;
    }
    for (const member of this.members.filter(({ aborted }) => aborted)) {
      this.#end(member, FinishKind.ABORTED);
    }
    const breaker = this.members.find((member) => this.#world.breaks(member));
    if (breaker !== undefined) {
      const { kind } = this.#world.scheduled(breaker.requestId);
      this.#world.noteBreak(breaker.requestId);
      this.#breaker = breaker.requestId;
      this.breaksAt = kind === 'hangs' ? tick + schedule.hangsFor : tick;
      if (kind !== 'hangs') {
        this.#break();
      }
      return;
    }
    for (const member of this.members) {
      const { submit, listener } = member;
      const index = submit.resumedTokens + member.tokens;
      member.tokens += 1;
      listener.onDelta(SequenceDelta.fromPartial({ index, tokenIds: [65], epoch: submit.epoch }));
      if (index + 1 >= this.#world.totalTokens(member.requestId)) {
        this.#end(member, FinishKind.LENGTH);
      }
    }
  }

  #end(member: Member, kind: FinishKind): void {
    this.members = this.members.filter((each) => each !== member);
    member.listener.onDelta(
      SequenceDelta.fromPartial({
        index: member.submit.resumedTokens + member.tokens,
        epoch: member.submit.epoch,
        finish: { kind },
      }),
    );
  }

  #break(): void {
    const { tick, schedule } = this.#world;
    const lost = this.members;
    this.#world.noteLoss(this.#breaker, lost.length === 1);
    this.members = [];
    this.breaksAt = undefined;
    this.backAt = tick + schedule.awayFor;
    for (const { listener } of lost) {
      listener.onLost(new ClusterError('unavailable', 'broke'), true);
    }
  }
}

function patienceTicks(breaksKnown: number): number {
  const company = companyFor({ breaks: breaksKnown, alone: false });
  return patienceMs({ company, breaks: breaksKnown }) / tickMs;
}

/** Gateways, groups and one dispatcher on one simulated clock. */
class World {
  readonly schedule: Schedule;
  tick = 0;
  readonly groups: Group[];
  readonly ends = new Map<string, string>();
  /** How many groups each request broke. */
  readonly broke = new Map<string, number>();
  /** How many groups it broke alone, after three breaks: each is the trial that convicts it. */
  readonly brokeAlone = new Map<string, number>();
  /** When each waiting request on trial began to wait. */
  readonly #waitsSince = new Map<string, number>();
  /** The longest wait of a request on trial for a group, beyond the patience of the waiting requests. */
  longestWaitTicks = 0;
  readonly #gateways: Requests[];
  readonly #seen = new Groups();
  readonly #records = new Map<number, RequestRecord>();
  #sequence = 0;
  #ended = 0;
  #epoch = 1;
  #state = new DispatchState();

  constructor(schedule: Schedule) {
    this.schedule = schedule;
    this.groups = Array.from({ length: schedule.groups }, (_, index) => new Group(`g${index}`, this));
    const records = {
      storeId: 's',
      publish: async (record: RequestRecord) => {
        this.#sequence += 1;
        this.#records.set(this.#sequence, record);
        this.#follow(this.#sequence, record);
        return { storeId: 's', sequence: this.#sequence };
      },
      erase: async ({ sequence }: { readonly sequence: number }) => this.#records.delete(sequence),
    };
    const signals = { publishEnded: (ended: RequestEnded) => this.#tell(ended) };
    const bus = { connected: true, records, signals } as unknown as Bus;
    const sessions = {
      to: (target: Session['target']) => ({
        target,
        submit: (submit: Omit<Submit, 'slot'>, listener: SequenceListener) =>
          this.#submit(target.group, submit, listener),
      }),
    } as unknown as Sessions;
    const metrics = new Proxy({}, { get: () => () => undefined }) as GatewayMetrics;
    this.#gateways = Array.from(
      { length: 3 },
      () =>
        new Requests({
          bus,
          sessions,
          groups: this.#seen,
          eraseAfterMs: Number.POSITIVE_INFINITY,
          maxWaitMs: 1e9,
          clientStallMs: 1e9,
          metrics,
          log,
        }),
    );
  }

  /** Runs until every request has ended; false if some never do. */
  async run(): Promise<boolean> {
    const { requests, termTicks, traffic } = this.schedule;
    const isOver = (): boolean => requests.every((_, index) => this.ends.has(`r${index}`));
    for (; this.tick < maxTicks && !isOver(); this.tick += 1) {
      if (traffic !== undefined && this.tick % traffic.everyTicks === 0) {
        this.#arrive(`t${this.tick}`, this.scheduled('t'));
      }
      for (const [index, request] of requests.entries()) {
        if (request.arrivesAt === this.tick) {
          this.#arrive(`r${index}`, request);
        }
      }
      if (termTicks > 0 && this.tick % termTicks === termTicks - 1) {
        this.#takeOver();
      }
      this.groups.forEach((group) => group.step());
      if (this.tick % beatTicks === 0) {
        for (const group of this.groups.filter(({ backAt }) => backAt === undefined)) {
          this.#seen.observe(group.heartbeat(), this.#nowMs);
        }
      }
      this.#dispatch();
      for (let turn = 0; turn < 6; turn += 1) {
        await Promise.resolve();
      }
    }
    this.#gateways.forEach((gateway) => gateway.failAll(new ClusterError('canceled', 'over')));
    return isOver();
  }

  scheduled(requestId: string): Scheduled {
    const { requests, traffic } = this.schedule;
    const innocent = {
      kind: 'innocent',
      gateway: 0,
      arrivesAt: 0,
      tokens: traffic?.tokens ?? 0,
      leavesAfter: 0,
    } as const;
    return requestId.startsWith('t') ? innocent : requests[Number(requestId.slice(1))]!;
  }

  totalTokens(requestId: string): number {
    const { kind, tokens } = this.scheduled(requestId);
    return kind === 'innocent' ? tokens : kind === 'crashes late' ? 60 : Number.POSITIVE_INFINITY;
  }

  breaks({ requestId, tokens, aborted }: Member): boolean {
    const scheduled = this.scheduled(requestId);
    return scheduled.kind !== 'innocent' && !aborted && tokens === scheduled.tokens;
  }

  noteBreak(requestId: string): void {
    this.broke.set(requestId, (this.broke.get(requestId) ?? 0) + 1);
    const { leavesAfter, gateway } = this.scheduled(requestId);
    if (leavesAfter > 0) {
      const at = this.tick + leavesAfter;
      this.#leaving.push({ requestId, gateway, at });
    }
  }

  noteLoss(breaker: string, alone: boolean): void {
    if (alone && (this.broke.get(breaker) ?? 0) > 3) {
      this.brokeAlone.set(breaker, (this.brokeAlone.get(breaker) ?? 0) + 1);
    }
  }

  readonly #leaving: { readonly requestId: string; readonly gateway: number; readonly at: number }[] = [];

  get #nowMs(): number {
    return 1_000 + this.tick * tickMs;
  }

  #arrive(requestId: string, { gateway }: Scheduled): void {
    const record = RequestRecord.fromPartial({ requestId, model: 'm', tenant: 't', promptTokenIds: [1] });
    const { relay } = this.#gateways[gateway]!.open(
      { ...record, gatewayId: String(gateway) },
      { tokenTable: tokenizer, stop: [], stopInReasoning: false, minTokens: 0, reasoning: undefined },
    );
    relay
      .deliver({ requestId, model: 'm', promptTokens: 1, seed: 0 }, async () => undefined)
      .then(
        () => this.ends.set(requestId, 'finish'),
        (error: unknown) => this.ends.set(requestId, ClusterError.from(error).code),
      );
  }

  #submit(
    name: string,
    submit: Omit<Submit, 'slot'>,
    listener: SequenceListener,
  ): ReturnType<Session['submit']> {
    const group = this.groups.find((each) => each.name === name)!;
    const member: Member = { requestId: submit.requestId, submit, listener, tokens: 0, aborted: false };
    if (group.backAt === undefined) {
      group.members.push(member);
    } else {
      queueMicrotask(() => listener.onLost(new ClusterError('unavailable', 'not there'), false));
    }
    return { abort: () => void (member.aborted = true), grant: () => undefined };
  }

  #tell(ended: RequestEnded): void {
    this.#ended += 1;
    if (this.#ended % 8 >= this.schedule.lostWords) {
      if (ended.requeued) {
        this.#state.requeue(ended, this.#nowMs);
      } else {
        this.#state.remove(ended.requestId, ended.released, this.#nowMs);
      }
    }
  }

  #follow(sequence: number, record: RequestRecord): void {
    this.#state.add(
      { storeId: 's', sequence, record: summaryOf(record), isArrival: true, ageMs: 0 },
      this.#nowMs,
    );
  }

  #takeOver(): void {
    this.#epoch += 1;
    this.#state = new DispatchState();
    this.#waitsSince.clear();
    for (const [sequence, record] of this.#records) {
      this.#follow(sequence, record);
    }
  }

  #measureWaits(): void {
    const waiting = new Map(
      [...this.#state.onTrial(this.#nowMs)].map((each) => [each.requestId, each.breaks]),
    );
    for (const requestId of this.#waitsSince.keys()) {
      if (!waiting.has(requestId)) {
        this.#waitsSince.delete(requestId);
      }
    }
    const patience = Math.max(...waiting.values().map(patienceTicks));
    for (const requestId of waiting.keys()) {
      const since = this.#waitsSince.get(requestId) ?? this.tick;
      this.#waitsSince.set(requestId, since);
      this.longestWaitTicks = Math.max(this.longestWaitTicks, this.tick - since - patience);
    }
  }

  /** Plans and assigns as dispatcher.ts does. */
  #dispatch(): void {
    for (const { requestId, gateway, at } of this.#leaving) {
      if (at === this.tick) {
        this.#gateways[gateway]!.cancelHeld({ requestId, tenant: 't' });
      }
    }
    const nowMs = this.#nowMs;
    this.#state.reconcile(this.#seen.alive('m', nowMs), nowMs);
    const ready = this.#seen.ready('m', nowMs);
    const groups = this.#state.openGroups(ready, new Map(), nowMs);
    this.#measureWaits();
    const plan = planAssignments(
      { onTrial: this.#state.onTrial(nowMs), waiting: this.#state.waiting(), groups },
      nowMs,
    );
    for (const { requestId, group: name, company, breaks } of plan) {
      const { group, incarnation, address, identity } = ready.find((each) => each.group === name)!;
      const record = this.#state.get(requestId)?.record;
      if (record === undefined) {
        // The request ended while the plan was carried out.
        continue;
      }
      this.#state.place(requestId, { group, incarnation }, nowMs);
      const target = { requestId, model: 'm', group, incarnation, address, identity, company, breaks };
      const reply = this.#gateways[Number(record.gatewayId)]!.assign({
        ...target,
        dispatcherEpoch: this.#epoch,
      });
      if (reply.outcome === AssignmentOutcome.UNFIT) {
        this.#state.refuse(requestId, reply.needs, nowMs);
      } else if (reply.outcome === AssignmentOutcome.UNKNOWN_REQUEST) {
        this.#state.remove(requestId, false, nowMs);
      } else {
        this.#state.confirm(requestId, reply, nowMs);
      }
    }
  }
}

describe('suspicion at work', () => {
  const poisons = fc.constantFrom<Kind>('crashes', 'hangs', 'crashes late');
  const scheduled = fc
    .record({
      kind: fc.oneof(
        { weight: 3, arbitrary: fc.constant<Kind>('innocent') },
        { weight: 1, arbitrary: poisons },
      ),
      gateway: fc.nat(2),
      arrivesAt: fc.nat(80),
      early: fc.nat(provenTokens - 1),
      late: fc.integer({ min: provenTokens, max: 12 }),
      length: fc.integer({ min: 1, max: 40 }),
      leavesAfter: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 30 })),
    })
    .map(({ early, late, length, ...request }): Scheduled => ({
      ...request,
      tokens: request.kind === 'innocent' ? length : request.kind === 'crashes late' ? late : early,
    }));
  const schedules = fc.record({
    requests: fc.array(scheduled, { minLength: 1, maxLength: 14 }),
    groups: fc.integer({ min: 1, max: 3 }),
    slots: fc.integer({ min: 1, max: 6 }),
    lostWords: fc.nat(3),
    hangsFor: fc.integer({ min: 1, max: 100 }),
    awayFor: fc.integer({ min: 1, max: 100 }),
    termTicks: fc.constantFrom(0, 0, 150, 400),
  });

  it('ends every poison after a few breaks and no innocent request, whenever clients leave', async () => {
    await fc.assert(
      fc.asyncProperty(schedules, async (schedule) => {
        const world = new World(schedule);
        expect(await world.run()).toBe(true);
        const wrong = schedule.requests.flatMap(({ kind, leavesAfter }, index) => {
          const end = world.ends.get(`r${index}`) ?? 'none';
          const breaksMade = world.broke.get(`r${index}`) ?? 0;
          // Four if nothing disturbs its trials. Each disturbance costs one more: its patience ended, or a new
          // dispatcher gave its group other requests before a heartbeat reported the trial.
          const isRight =
            kind === 'crashes late' ||
            (kind === 'innocent'
              ? end === 'finish'
              : breaksMade <= mostBreaks &&
                (world.brokeAlone.get(`r${index}`) ?? 0) <= 1 &&
                (end === 'aborted' || (leavesAfter > 0 && end === 'canceled')));
          return isRight ? [] : [`request ${index}, ${kind}: ${end} after ${breaksMade} breaks`];
        });
        expect(wrong).toEqual([]);
      }),
      { numRuns: Number(process.env['SUSPICION_RUNS'] ?? 300) },
    );
  });

  it('places a request on trial in time, for any load of other requests', async () => {
    const busy = fc.record({
      requests: fc
        .record({ kind: fc.constantFrom<Kind>('crashes', 'hangs'), tokens: fc.nat(provenTokens - 1) })
        .map((poison) => [{ ...poison, gateway: 1, arrivesAt: 60, leavesAfter: 0 }]),
      groups: fc.integer({ min: 1, max: 3 }),
      slots: fc.integer({ min: 2, max: 6 }),
      lostWords: fc.nat(3),
      hangsFor: fc.integer({ min: 1, max: 100 }),
      awayFor: fc.integer({ min: 1, max: 400 }),
      // A new dispatcher starts the wait anew.
      termTicks: fc.constantFrom(0, 0, 3_000),
      traffic: fc.record({
        everyTicks: fc.integer({ min: 3, max: 20 }),
        tokens: fc.constantFrom(1, 20, 200, 600),
      }),
    });
    await fc.assert(
      fc.asyncProperty(busy, async (schedule) => {
        const world = new World(schedule);
        expect(await world.run()).toBe(true);
        expect(world.ends.get('r0')).toBe('aborted');
        expect([...world.ends].filter(([id, end]) => id !== 'r0' && end === 'aborted')).toEqual([]);
        // A running request leaves its slot; broken groups return; other requests on trial go first, each until it
        // makes progress.
        const { groups, slots, hangsFor, awayFor, traffic } = schedule;
        const aBreak = hangsFor + awayFor + 2 * settleTicks;
        const aTrial = provenTokens + settleTicks + 2 * beatTicks;
        const breaksMade = world.broke.get('r0') ?? 0;
        const bound = traffic.tokens + breaksMade * aBreak + groups * slots * aTrial;
        expect(world.longestWaitTicks).toBeLessThanOrEqual(bound);
      }),
      { numRuns: Number(process.env['SUSPICION_RUNS'] ?? 50) },
    );
  });
});
