// TCP ports on loopback for servers that must know their port before they start. Owns a block of ports for this
// process, so that processes side by side never hand out the same one. Does not know what listens on them.

import { once } from 'node:events';
import { createServer, type Server } from 'node:net';

import { ClusterError } from '@mimo/core/process/errors';

/**
 * Below the ports that Linux (32,768) and macOS (49,152) use for outgoing connections and port 0, and below the node
 * ports of Kubernetes (30,000): between here and the server's start nothing else takes the port by chance.
 */
const firstPort = 16_000;
/** More than a process needs at a time, so that a port rests for a while before it is handed out again. */
const blockPorts = 250;
const blocks = 56;

/** Listens on the first port of the block for as long as the process lives: that holds the block. */
interface Block {
  readonly first: number;
  next: number;
}

let reserving: Promise<Block> | undefined;

/** Ports of 127.0.0.1 that nothing listens on; no other process gets them from here while this one lives. */
export async function freePorts(count: number): Promise<readonly number[]> {
  const block = await (reserving ??= reserveBlock());
  const ports: number[] = [];
  for (let tried = 1; ports.length < count; tried++) {
    if (tried === blockPorts) {
      const text = `${count} ports wanted, but only ${ports.length} of ${blockPorts} from ${block.first} on are free`;
      throw new ClusterError('resource_exhausted', text);
    }
    block.next = (block.next % (blockPorts - 1)) + 1;
    const port = block.first + block.next;
    if (await isFree(port)) {
      ports.push(port);
    }
  }
  return ports;
}

/** The same, as host:port. */
export async function freeAddresses(count: number): Promise<readonly string[]> {
  return (await freePorts(count)).map((port) => `127.0.0.1:${port}`);
}

async function reserveBlock(): Promise<Block> {
  for (let tried = 0; tried < blocks; tried++) {
    const first = firstPort + ((process.pid + tried) % blocks) * blockPorts;
    const guard = await listenOn(first).catch(() => undefined);
    if (guard !== undefined) {
      guard.unref();
      return { first, next: 0 };
    }
  }
  const last = firstPort + blocks * blockPorts - 1;
  throw new ClusterError('resource_exhausted', `other processes hold all ports from ${firstPort} to ${last}`);
}

async function isFree(port: number): Promise<boolean> {
  return assertPortFree(port).then(
    () => true,
    () => false,
  );
}

/** Fails with `unavailable` if something listens on the port. */
export async function assertPortFree(port: number): Promise<void> {
  try {
    const server = await listenOn(port);
    server.close();
    await once(server, 'close');
  } catch (error) {
    const text = `port ${port} of 127.0.0.1 is in use: stop the process that listens there, or choose another with --port`;
    throw new ClusterError('unavailable', text, { cause: error });
  }
}

async function listenOn(port: number): Promise<Server> {
  const server = createServer().listen(port, '127.0.0.1');
  await once(server, 'listening');
  return server;
}
