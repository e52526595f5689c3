import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:net';
import { join } from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { assertPortFree, freePorts } from '../../cli/src/local/free-ports.ts';

const module = join(import.meta.dirname, '../../cli/src/local/free-ports.ts');

describe('freePorts', () => {
  const children: ChildProcess[] = [];
  afterEach(async () => {
    await Promise.all(
      children.splice(0).map(async (child) => {
        const exit = once(child, 'exit');
        child.kill('SIGKILL');
        await exit;
      }),
    );
  });

  /** Ports that another process got, which keeps its block until it is killed. */
  async function portsOfAnother(count: number): Promise<readonly number[]> {
    const source = `const { freePorts } = await import(${JSON.stringify(module)});
      process.send(await freePorts(${count}));
      process.on('message', () => undefined);`;
    const child = fork('-', { execArgv: ['--input-type=module', '--eval', source] });
    children.push(child);
    const [ports] = (await once(child, 'message')) as [readonly number[]];
    return ports;
  }

  it('returns different ports to processes that ask at the same time', async () => {
    const calls = [freePorts(20), freePorts(20), ...Array.from({ length: 6 }, () => portsOfAnother(20))];
    const ports = (await Promise.all(calls)).flat();
    expect(ports).toHaveLength(160);
    expect(new Set(ports).size).toBe(ports.length);
  });

  it("returns only ports outside the kernel's ephemeral range", async () => {
    const server = createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    const address = server.address();
    const ports = await freePorts(50);
    expect(address).toMatchObject({ port: expect.toSatisfy((port) => port > Math.max(...ports)) });
    server.close();
  });

  it('skips a port in use, and returns ports again after a round', async () => {
    const [port = 0] = await freePorts(1);
    const server = createServer().listen(port, '127.0.0.1');
    await once(server, 'listening');
    await expect(assertPortFree(port)).rejects.toMatchObject({ code: 'unavailable' });
    const round = await freePorts(248);
    expect(round).not.toContain(port);
    server.close();
    await once(server, 'close');
    expect(await freePorts(2)).toContain(port);
    await expect(freePorts(250)).rejects.toMatchObject({ code: 'resource_exhausted' });
  });
});
