// Contenders for one real Lease, each behind a separate network: never two leaders at once, whatever breaks.

import { beforeAbort } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { KubeClient } from '@mimo/controller/kube/client';
import { runLeading, type LeaderElectionTiming } from '@mimo/controller/kube/leader-election';
import { resourceTypes, type KubeObject } from '@mimo/controller/kube/resource';
import { createLog } from '@mimo/core/process/log';
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest';

import { createNamespace, kubeConfigVia } from '../harness/kubernetes/config-maps.ts';
import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { startFaultProxy, type FaultProxy } from '../harness/kubernetes/fault-proxy.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';

const log = createLog({ process: 'test', level: 'silent' });
const soon = (): AbortSignal => AbortSignal.timeout(60_000);
const namespace = 'election';
/** Far longer than anything here takes, also where processes are stopped for seconds. */
const patient: LeaderElectionTiming = { leaseDurationMs: 60_000, renewDeadlineMs: 40_000, retryMs: 500 };
/** Where leases have to run out, and may at any time. */
const quick: LeaderElectionTiming = { leaseDurationMs: 4_000, renewDeadlineMs: 2_500, retryMs: 400 };

let plane: ControlPlane;
let client: KubeClient;

beforeAll(async () => {
  plane = await startControlPlane({ tools: await findTools() });
  client = await createNamespace(plane.kubeconfig, namespace);
});
afterAll(async () => {
  client.close();
  await plane.close();
});

interface Term {
  readonly name: string;
  readonly fromMs: number;
  untilMs: number | undefined;
}

interface Contender {
  readonly name: string;
  readonly proxy: FaultProxy;
  readonly leading: boolean;
  /** Ends cleanly. */
  stop(): Promise<void>;
}

/** One election: its contenders, and who led when. */
class Election {
  readonly terms: Term[] = [];
  readonly leaseName: string;
  readonly timing: LeaderElectionTiming;

  constructor(leaseName: string, timing = patient) {
    this.leaseName = leaseName;
    this.timing = timing;
  }

  async contend(name: string, lingerMs = 0): Promise<Contender> {
    const proxy = await startFaultProxy(plane.url);
    const proxied = new KubeClient(kubeConfigVia(plane.kubeconfig, proxy.url), { namespace });
    const stopping = new AbortController();
    const { leaseName, timing } = this;
    let term: Term | undefined;
    const running = runLeading(
      { client: proxied, leaseName, identity: name, log, timing },
      async (signal) => {
        term = { name, fromMs: performance.now(), untilMs: undefined };
        this.terms.push(term);
        await beforeAbort(new Promise(() => undefined), signal).catch(() => undefined);
        await new Promise((resolve) => setTimeout(resolve, lingerMs));
        term.untilMs = performance.now();
        term = undefined;
      },
      stopping.signal,
    );
    const stop = async (): Promise<void> => {
      stopping.abort(new ClusterError('canceled', 'stopping'));
      await running;
      proxied.close();
      await proxy.close();
    };
    onTestFinished(async () => {
      proxy.mode = 'pass';
      await stop();
    });
    return {
      name,
      proxy,
      get leading() {
        return term !== undefined;
      },
      stop,
    };
  }

  async holder(): Promise<string> {
    const lease = await client.get<KubeObject & { spec: { holderIdentity: string } }>(
      resourceTypes.leases,
      this.leaseName,
      soon(),
    );
    return lease.spec.holderIdentity;
  }

  /** Pairs of terms that overlap. */
  get overlaps(): readonly (readonly [Term, Term])[] {
    return this.terms.flatMap((one, index) =>
      this.terms
        .slice(index + 1)
        .filter(
          (other) => one.fromMs < (other.untilMs ?? Infinity) && other.fromMs < (one.untilMs ?? Infinity),
        )
        .map((other) => [one, other] as const),
    );
  }
}

describe('leader election', () => {
  it('elects one leader; a clean stop hands over at once', async () => {
    const election = new Election('clean');
    const first = await election.contend('first');
    await waitFor('the first', () => first.leading);
    const second = await election.contend('second');
    expect(await election.holder()).toMatch(/^first_/);
    const beganMs = performance.now();
    await first.stop();
    await waitFor('the second', () => second.leading);
    // Before the lease would have run out: it was given back.
    expect(performance.now() - beganMs).toBeLessThan(election.timing.leaseDurationMs);
    expect(await election.holder()).toMatch(/^second_/);
    expect(election.overlaps).toEqual([]);
  });

  it("keeps the lease while the leader's work is still ending", async () => {
    const leaseDurationMs = 15_000;
    const election = new Election('lingering', { leaseDurationMs, renewDeadlineMs: 12_000, retryMs: 500 });
    const first = await election.contend('first', leaseDurationMs + 3_000);
    await waitFor('the first', () => first.leading);
    const second = await election.contend('second');
    await first.stop();
    await waitFor('the second', () => second.leading);
    const [led] = election.terms;
    expect((led?.untilMs ?? 0) - (led?.fromMs ?? 0)).toBeGreaterThan(leaseDurationMs);
    expect(election.overlaps).toEqual([]);
  });

  it('ends a leadership that cannot be renewed before another begins, and competes again afterwards', async () => {
    const leaseDurationMs = 20_000;
    const election = new Election('silent', { leaseDurationMs, renewDeadlineMs: 12_000, retryMs: 1_000 });
    const first = await election.contend('first');
    await waitFor('the first', () => first.leading);
    const second = await election.contend('second');
    first.proxy.mode = 'silent';
    first.proxy.silence();
    const silentMs = performance.now();
    await waitFor('the end of the first', () => !first.leading);
    expect((election.terms[0]?.untilMs ?? Infinity) - silentMs).toBeLessThan(leaseDurationMs);
    await waitFor('the second', () => second.leading, 60_000);
    first.proxy.mode = 'pass';
    await second.stop();
    await waitFor('the first again', () => first.leading);
    expect(election.terms.map(({ name }) => name)).toEqual(['first', 'second', 'first']);
    expect(election.overlaps).toEqual([]);
  });

  it('ends a leadership at once when another holds the lease', async () => {
    const election = new Election('stolen');
    const first = await election.contend('first');
    await waitFor('the first', () => first.leading);
    const stolen = { spec: { holderIdentity: 'thief', leaseDurationSeconds: 2 } };
    await client.patch(resourceTypes.leases, election.leaseName, stolen, {}, soon());
    await waitFor('the end of the first', () => election.terms[0]?.untilMs !== undefined);
    // The thief never renews.
    await waitFor('the first again', () => first.leading);
    expect(election.terms).toHaveLength(2);
  });

  it('recovers from a restart of the API server, without two leaders', async () => {
    const election = new Election('restart', quick);
    const contenders = [await election.contend('first'), await election.contend('second')];
    await waitFor('a leader', () => contenders.some(({ leading }) => leading));
    await plane.stopApiserver('SIGKILL');
    await plane.startApiserver();
    await waitFor('a leader', () => contenders.some(({ leading }) => leading));
    expect(election.overlaps).toEqual([]);
  });

  it('never has two leaders while their networks break at random', async () => {
    const election = new Election('chaos', quick);
    const contenders = [
      await election.contend('a'),
      await election.contend('b'),
      await election.contend('c'),
    ];
    for (let round = 0; round < 5; round += 1) {
      await waitFor('a leader', () => contenders.some(({ leading }) => leading));
      const leader = contenders.find(({ leading }) => leading);
      if (leader !== undefined) {
        leader.proxy.mode = round % 2 === 0 ? 'silent' : 'refuse';
        if (round % 2 === 0) {
          leader.proxy.silence();
        } else {
          leader.proxy.cut();
        }
        await waitFor('its end', () => !leader.leading);
        // Back before the lease has run out it is the leader again, later it is another.
        if (round < 3) {
          await waitFor('another', () => contenders.some(({ leading }) => leading));
        }
        leader.proxy.mode = 'pass';
      }
    }
    expect(new Set(election.terms.map(({ name }) => name)).size).toBeGreaterThan(1);
    expect(election.overlaps).toEqual([]);
  });

  it("releases the lease when the leader's work ends or fails by itself", async () => {
    const options = { client, leaseName: 'by-itself', identity: 'only', log, timing: patient };
    await runLeading(options, async () => undefined, soon());
    const failing = runLeading(options, () => Promise.reject(new Error('broken')), soon());
    await expect(failing).rejects.toThrow('broken');
    expect(await new Election('by-itself').holder()).toBe('');
  });

  it('rejects durations that could allow two leaders', async () => {
    const wrong = { ...patient, renewDeadlineMs: patient.leaseDurationMs };
    const options = { client, leaseName: 'wrong', identity: 'only', log, timing: wrong };
    await expect(runLeading(options, async () => undefined, soon())).rejects.toMatchObject({
      code: 'invalid_argument',
    });
  });
});
