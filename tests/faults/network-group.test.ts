// A tensor-parallel group of real processes: it computes the oracle's results, rejects incompatible members, and
// notices a dead member at once and a silent one in time.

import { afterAll, afterEach, describe, expect, it } from 'vitest';
import type { EngineOptions, GroupOptions, SequenceRequest } from '@mimo/worker/engines/mimo/engine-host';
import { CompiledFixtures, readExpectedIds } from '../golden/fixture.ts';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { RankProcess } from '../harness/engine-ranks.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';

const name = 'two-to-one-sharded';
const { promptIds, greedyIds } = readExpectedIds(name);
const fixtures = new CompiledFixtures();
const ranks: RankProcess[] = [];

afterEach(async () => {
  await Promise.all(ranks.splice(0).map((rank) => rank.kill()));
});
afterAll(() => fixtures.remove());

function request(sequenceId: number, maxTokens: number): SequenceRequest {
  const sampling = greedySampling({ maxTokens });
  return { sequenceId, tokenIds: promptIds, resumedTokens: 0, sampling, creditTokens: 1e9 };
}

type Network = Extract<GroupOptions, { kind: 'network' }>;

/** Starts one process per entry; entries say what is different about it. */
async function startRanks(
  worldSize: number,
  members: readonly {
    rank: number;
    group?: Partial<Network>;
    shards?: Parameters<CompiledFixtures['compile']>[1];
  }[],
): Promise<RankProcess[]> {
  const addresses = await freeAddresses(worldSize);
  const started = await Promise.all(
    members.map(async ({ rank, group, shards }) => {
      const directories = await fixtures.compile(
        name,
        shards ?? { precision: 'fp32', tensorParallel: worldSize },
      );
      const options: EngineOptions = {
        shardDirectories: [directories[rank]!],
        group: {
          kind: 'network',
          rank,
          addresses,
          token: 'secret',
          connectTimeoutMs: 60_000,
          peerTimeoutMs: 60_000,
          ...group,
        },
        maxSequences: 8,
      };
      return new RankProcess(options);
    }),
  );
  ranks.push(...started);
  return started;
}

async function startGroup(worldSize: number, group: Partial<Network> = {}): Promise<RankProcess[]> {
  const started = await startRanks(
    worldSize,
    Array.from({ length: worldSize }, (_, rank) => ({ rank, group })),
  );
  for (const rank of started) {
    expect(await rank.response('ready', 'rejected')).toEqual({ kind: 'ready' });
  }
  return started;
}

describe('a network group', () => {
  it.each([2, 4])(
    'of %i processes continues as the oracle does, and ends when its leader closes',
    async (worldSize) => {
      const [leader, ...followers] = await startGroup(worldSize);
      leader!.submit(request(1, greedyIds.length));
      const deltas = await leader!.ended(1);
      expect(deltas.flatMap(({ tokenIds }) => tokenIds)).toEqual(greedyIds);
      leader!.send({ kind: 'close' });
      for (const follower of followers) {
        expect(await follower.response('failed')).toMatchObject({
          code: 'canceled',
          message: 'the leader has dissolved the group',
        });
      }
    },
  );

  it('loses a follower that is killed at once, while idle and in the middle of sequences', async () => {
    for (const isBusy of [false, true]) {
      const [leader, follower] = await startGroup(2);
      const live = isBusy ? [1, 2, 3] : [];
      live.forEach((id) => leader!.submit(request(id, 20_000)));
      if (isBusy) {
        await leader!.response('frame');
      }
      follower!.process.kill('SIGKILL');
      expect(await leader!.response('failed')).toMatchObject({
        code: 'unavailable',
        message: expect.stringMatching(/^rank 1 is lost/),
      });
      for (const id of live) {
        const deltas = leader!.deltas.filter(({ sequenceId }) => sequenceId === id);
        const completion = deltas.flatMap(({ tokenIds }) => tokenIds);
        expect(completion.slice(0, greedyIds.length)).toEqual(greedyIds.slice(0, completion.length));
        // What is lost with the group ends where sequences are kept (worker/src/sequences.ts).
        expect(deltas.filter(({ finish }) => finish !== undefined)).toEqual([]);
      }
    }
  });

  it('ends on the follower when the leader is killed', async () => {
    const [leader, follower] = await startGroup(2);
    leader!.process.kill('SIGKILL');
    expect(await follower!.response('failed')).toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/^rank 0 is lost/),
    });
  });

  it.each([
    ['follower', 1],
    ['leader', 0],
  ])('gives a stopped %s up after the timeout', async (_, stopped) => {
    const group = await startGroup(2, { peerTimeoutMs: 3_000 });
    group[stopped]!.process.kill('SIGSTOP');
    const lost = await group[1 - stopped]!.response('failed');
    expect(lost).toMatchObject({
      code: 'deadline_exceeded',
      message: expect.stringMatching(new RegExp(`^rank ${stopped} is lost: silent`)),
    });
  });

  it('rejects another model on both sides, naming both values', async () => {
    const shards = { precision: 'fp32', tensorParallel: 2, mtpHidden: 'post-norm' } as const;
    for (const rank of await startRanks(2, [{ rank: 0 }, { rank: 1, shards }])) {
      expect(await rank.response('rejected')).toMatchObject({
        code: 'failed_precondition',
        message: expect.stringMatching(/shardKey: rank \d has [0-9a-f]{64}, rank \d has [0-9a-f]{64}/),
      });
    }
  });
});
