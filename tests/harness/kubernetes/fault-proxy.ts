// A TCP proxy in front of a server, with the faults of networks: refused and cut connections, silence, an answer that
// ends in the middle. It does not parse the bytes, so TLS passes through it from end to end.

import { once } from 'node:events';
import { connect, createServer, type AddressInfo, type Socket } from 'node:net';
import { Transform } from 'node:stream';

/** The treatment of new connections: forwarded, reset at once, or accepted and never answered. */
type FaultMode = 'pass' | 'refuse' | 'silent';

/** A running proxy. Close it. */
export interface FaultProxy {
  /** Of the proxy, with the server's scheme. */
  readonly url: string;
  /** Connections from clients that are open now. */
  readonly openConnections: number;
  mode: FaultMode;
  /** Resets every open connection. */
  cut(): void;
  /** Makes every open connection silent for good: what is sent is taken, and nothing comes. */
  silence(): void;
  /** Cuts every connection of now and later once so many more bytes have come from the server; undefined: no longer. */
  cutAfterBytes(bytes: number | undefined): void;
  close(): Promise<void>;
}

interface Link {
  readonly client: Socket;
  readonly server: Socket | undefined;
}

/** Starts a proxy on a free port of loopback, in front of the server of that URL. */
export async function startFaultProxy(serverUrl: string): Promise<FaultProxy> {
  const target = new URL(serverUrl);
  const links = new Set<Link>();
  let mode: FaultMode = 'pass';
  let bytesLeft: number | undefined;

  const reset = ({ client, server }: Link): void => {
    client.resetAndDestroy();
    server?.destroy();
  };
  const listener = createServer((client) => {
    if (mode === 'refuse') {
      client.resetAndDestroy();
      return;
    }
    const server =
      mode === 'pass' ? connect({ host: target.hostname, port: Number(target.port) }) : undefined;
    const link: Link = { client, server };
    links.add(link);
    client.on('error', () => undefined);
    client.once('close', () => {
      links.delete(link);
      server?.destroy();
    });
    if (server === undefined) {
      client.resume();
      return;
    }
    server.on('error', () => client.resetAndDestroy());
    client.pipe(server);
    server
      .pipe(
        new Transform({
          transform(chunk: Buffer, _encoding, done) {
            if (bytesLeft === undefined || chunk.length <= bytesLeft) {
              bytesLeft = bytesLeft === undefined ? undefined : bytesLeft - chunk.length;
              done(null, chunk);
              return;
            }
            // What comes after the cut is the end of the connection, so that what came before it arrives.
            client.end(chunk.subarray(0, bytesLeft));
            bytesLeft = 0;
            server.destroy();
            done();
          },
        }),
      )
      .pipe(client);
  });
  listener.listen(0, '127.0.0.1');
  await once(listener, 'listening');
  const { port } = listener.address() as AddressInfo;

  return {
    url: `${target.protocol}//127.0.0.1:${port}`,
    get openConnections() {
      return links.size;
    },
    get mode() {
      return mode;
    },
    set mode(wanted) {
      mode = wanted;
    },
    cut: () => {
      for (const link of links) {
        reset(link);
      }
    },
    silence: () => {
      for (const { client, server } of links) {
        client.unpipe();
        client.resume();
        server?.unpipe();
        server?.resume();
      }
    },
    cutAfterBytes: (bytes) => {
      bytesLeft = bytes;
    },
    close: async () => {
      listener.close();
      for (const link of links) {
        reset(link);
      }
      await once(listener, 'close');
    },
  };
}
