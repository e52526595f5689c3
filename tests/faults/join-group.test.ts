// The handshake of a network group over real sockets: which ranks are accepted and rejected, and the errors of both
// sides.

import * as net from 'node:net';
import { once } from 'node:events';
import { describe, expect, it } from 'vitest';
import { joinGroup, type JoinOptions } from '@mimo/worker/collective/join-group';
import { closeDescriptor } from '@mimo/worker/collective/libc';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';

const shardKey = 'a'.repeat(64);

async function members(
  worldSize: number,
  different: Readonly<Record<number, (options: JoinOptions) => JoinOptions>> = {},
) {
  const addresses = await freeAddresses(worldSize);
  return Array.from({ length: worldSize }, (_, rank) => {
    const options: JoinOptions = {
      member: { rank, worldSize, shardKey, precision: 'int8' },
      addresses,
      listenAddress: addresses[rank]!,
      token: 'secret',
      timeoutMs: 30_000,
    };
    return different[rank]?.(options) ?? options;
  });
}

const never = new AbortController().signal;

async function joinAll(options: readonly JoinOptions[], signal = never) {
  return Promise.allSettled(
    options.map(async (each) => {
      const peers = await joinGroup(each, signal);
      peers.forEach(({ fd }) => closeDescriptor(fd));
      return peers.map(({ rank, dialled }) => `${rank}${dialled ? ' dialled' : ''}`);
    }),
  );
}

const refused = (code: string, message: RegExp) =>
  expect.objectContaining({
    status: 'rejected',
    reason: expect.objectContaining({ code, message: expect.stringMatching(message) }),
  });

describe('joinGroup', () => {
  it.each([1, 2, 4])('connects every pair of %i ranks, the higher dialling the lower', async (worldSize) => {
    const joined = await joinAll(await members(worldSize));
    for (const [rank, result] of joined.entries()) {
      const expected = Array.from({ length: worldSize }, (_, peer) =>
        peer < rank ? `${peer} dialled` : `${peer}`,
      );
      expect(result).toEqual({ status: 'fulfilled', value: expected.filter((_peer, i) => i !== rank) });
    }
  });

  it.each<[string, Partial<JoinOptions['member']>, RegExp]>([
    ['other shards', { shardKey: 'b'.repeat(64) }, /shardKey: rank \d has (a+|b+), rank \d has (a+|b+)/],
    ['another precision', { precision: 'int4' }, /precision: rank \d has int[48], rank \d has int[48]/],
    ['another world size', { worldSize: 3 }, /worldSize: rank \d has [23], rank \d has [23]/],
  ])('refuses %s on both sides, naming both values', async (_, member, message) => {
    const options = await members(2, { 1: (each) => ({ ...each, member: { ...each.member, ...member } }) });
    const [leader, follower] = await joinAll(options);
    expect(leader).toEqual(refused('failed_precondition', message));
    expect(follower).toEqual(refused('failed_precondition', message));
  });

  it('refuses a rank that has already joined', async () => {
    const options = await members(3, {
      2: (each) => ({ ...each, member: { ...each.member, rank: 1 }, listenAddress: '127.0.0.1:0' }),
    });
    const joined = await joinAll(options.map((each) => ({ ...each, timeoutMs: 3_000 })));
    expect(joined[0]).toEqual(
      refused('failed_precondition', /rank 0 of 3 was joined by rank 1, which is taken/),
    );
    expect(joined.slice(1)).toContainEqual(refused('failed_precondition', /rank 1, which is taken|rank 0/));
  });

  it('rejects other tokens and strangers, and still connects its own ranks', async () => {
    const options = await members(2);
    const stranger = { ...options[1]!, token: 'guess', listenAddress: '127.0.0.1:0' };
    const leader = joinAll([options[0]!]);
    expect(await joinAll([stranger])).toEqual([refused('permission_denied', /group token/)]);
    const [host, port] = options[0]!.listenAddress.split(':');
    const socket = net.connect(Number(port), host);
    socket.write('GET / HTTP/1.1\r\n\r\n');
    await once(socket, 'close');
    expect(await joinAll([options[1]!])).toMatchObject([{ status: 'fulfilled' }]);
    expect(await leader).toMatchObject([{ status: 'fulfilled' }]);
  });

  it('accepts a rank that dials again after its connection broke in the middle of the handshake', async () => {
    const options = await members(2);
    const leader = joinAll([options[0]!]);
    const [host, port] = options[0]!.listenAddress.split(':');
    const { member, token } = options[1]!;
    const hello = Buffer.from(JSON.stringify({ kind: 'hello', protocolVersion: 1, token, ...member }));
    const length = Buffer.alloc(4);
    length.writeUInt32LE(hello.length);
    const socket = net.connect(Number(port), host);
    socket.write(Buffer.concat([length, hello]));
    await once(socket, 'data');
    socket.destroy();
    expect(await joinAll([options[1]!])).toMatchObject([{ status: 'fulfilled' }]);
    expect(await leader).toMatchObject([{ status: 'fulfilled' }]);
  });

  it('names the missing ranks, and stops when its signal fires', async () => {
    const options = await members(3);
    const alone = { ...options[0]!, timeoutMs: 300 };
    expect(await joinAll([alone])).toEqual([
      refused('deadline_exceeded', /rank 1 \(127\S+\), rank 2 \(127\S+\) did not connect within 300 ms/),
    ]);
    const stop = new AbortController();
    const joined = joinAll(options.slice(1), stop.signal);
    stop.abort();
    expect(await joined).toEqual([refused('canceled', /abort/i), refused('canceled', /abort/i)]);
  });
});
