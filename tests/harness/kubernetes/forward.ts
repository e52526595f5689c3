// A port on this machine's loopback that forwards to a connection made inside a box, so that a test outside can reach
// servers in the namespaces. A Unix socket crosses them without a route; socat dials from within.

import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { access } from 'node:fs/promises';
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { join } from 'node:path';

import { waitFor } from '../wait-for.ts';
import type { Box } from './box.ts';

/** A forwarded port. Close it. */
export interface Forward {
  /** On 127.0.0.1. */
  readonly port: number;
  close(): Promise<void>;
}

/** Each connection to the port becomes one to `host:port` as seen from inside the box. */
export async function forward(box: Box, target: { host: string; port: number }): Promise<Forward> {
  const socketFile = join(box.directory, `${randomUUID()}.sock`);
  const listen = `UNIX-LISTEN:${socketFile},fork,backlog=512`;
  const socat = await box.start('socat', ['socat', listen, `TCP:${target.host}:${target.port},nodelay`]);
  await waitFor(`socat to listen on ${socketFile}`, async () => access(socketFile).then(() => true));
  const open = new Set<Socket>();
  const server = createServer({ noDelay: true }, (outside) => {
    const inside = connect(socketFile);
    for (const [from, to] of [
      [outside, inside],
      [inside, outside],
    ] as const) {
      open.add(from);
      from.on('error', () => to.destroy());
      from.on('close', () => {
        open.delete(from);
        to.destroy();
      });
      from.pipe(to);
    }
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    port: (server.address() as AddressInfo).port,
    close: async () => {
      for (const socket of open) {
        socket.destroy();
      }
      await closed(server);
      await socat.stop();
    },
  };
}

async function closed(server: Server): Promise<void> {
  const ended = once(server, 'close');
  server.close();
  await ended;
}
