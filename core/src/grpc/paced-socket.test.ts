import { once } from 'node:events';
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { setImmediate as nextTurn } from 'node:timers/promises';

import * as fc from 'fast-check';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { PacedSocket } from './paced-socket.ts';

const patience = { timeout: 30_000, interval: 5 };
const opened: (Server | Socket)[] = [];

afterEach(() => {
  for (const each of opened.splice(0)) {
    if ('destroy' in each) {
      each.destroy();
    } else {
      each.close();
    }
  }
});

/** Both ends of a connection; the server's is paced. */
async function openPair(): Promise<{ client: Socket; socket: Socket; paced: PacedSocket }> {
  const server = createServer({ allowHalfOpen: true });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const client = connect(port, '127.0.0.1');
  const [socket] = (await once(server, 'connection')) as [Socket];
  opened.push(server, client, socket);
  return { client, socket, paced: new PacedSocket(socket) };
}

describe('PacedSocket', () => {
  it('passes on all bytes in order, a limited number per turn', async () => {
    const turnBytes = fc.integer({ min: 1_000, max: 64_000 });
    const sizes = fc.array(fc.integer({ min: 1, max: 300_000 }), { minLength: 1, maxLength: 5 });
    await fc.assert(
      fc.asyncProperty(turnBytes, sizes, async (limit, lengths) => {
        const { client, paced } = await openPair();
        const sent = Buffer.concat(lengths.map((length, at) => Buffer.alloc(length, at + 1)));
        client.end(sent);
        let turn = 0;
        const over = new AbortController();
        const counting = (async () => {
          while (!over.signal.aborted) {
            await nextTurn();
            turn += 1;
          }
        })();
        const byTurn = new Map<number, number>();
        paced.turnBytes = () => limit;
        const got: Buffer[] = [];
        paced.on('data', (chunk: Buffer) => {
          got.push(chunk);
          byTurn.set(turn, (byTurn.get(turn) ?? 0) + chunk.length);
        });
        await once(paced, 'end');
        over.abort();
        await counting;
        expect(Buffer.concat(got).equals(sent)).toBe(true);
        expect(paced.passedBytes).toBe(sent.length);
        // A turn of the counter may see the end of one turn and the beginning of the next.
        expect(Math.max(...byTurn.values())).toBeLessThanOrEqual(2 * limit);
      }),
      { numRuns: 20 },
    );
  });

  it('passes on nothing more once its allowance is zero', async () => {
    const { client, paced } = await openPair();
    client.on('error', () => undefined);
    let left = 3;
    paced.turnBytes = () => {
      left -= 1;
      if (left < 0) {
        paced.destroy();
      }
      return left < 0 ? 0 : 1_000;
    };
    paced.resume();
    client.write(Buffer.alloc(2 ** 20));
    await once(paced, 'close');
    expect(paced.passedBytes).toBe(3_000);
    await vi.waitFor(() => expect(client.destroyed).toBe(true), patience);
  });

  it('reads no more than its reader consumes', async () => {
    const { client, socket, paced } = await openPair();
    client.write(Buffer.alloc(16 * 2 ** 20));
    paced.read(0);
    await vi.waitFor(() => expect(paced.readableLength).toBeGreaterThan(0), patience);
    for (let turn = 0; turn < 100; turn++) {
      await nextTurn();
    }
    expect(socket.bytesRead).toBeLessThan(2 ** 20);
    paced.resume();
    await vi.waitFor(() => expect(paced.passedBytes).toBe(16 * 2 ** 20), patience);
  });

  it('writes, ends and closes as the socket does', async () => {
    const { client, paced } = await openPair();
    const got: Buffer[] = [];
    client.on('data', (chunk: Buffer) => got.push(chunk));
    paced.resume();
    paced.cork();
    paced.write('a');
    paced.write('b');
    paced.uncork();
    paced.write('c');
    paced.end('d');
    await once(client, 'end');
    expect(Buffer.concat(got).toString()).toBe('abcd');
    client.end();
    await once(paced, 'close');
    expect(paced.destroyed).toBe(true);
  });

  it('is destroyed with the socket, and destroys it', async () => {
    const first = await openPair();
    first.paced.resume();
    first.client.resetAndDestroy();
    first.paced.on('error', () => undefined);
    await once(first.paced, 'close').catch(() => undefined);
    await vi.waitFor(() => expect(first.paced.destroyed).toBe(true), patience);
    const second = await openPair();
    second.client.on('error', () => undefined);
    second.paced.destroy();
    await vi.waitFor(() => expect(second.client.destroyed).toBe(true), patience);
    expect(second.socket.destroyed).toBe(true);
  });
});
