// A connection that is read a little at a time, so that no peer holds up the event loop: libuv reads up to 2 MB of one
// socket before it turns to the next, and node:http2 unpacks all of it in one go, though each byte may name a header of
// kilobytes. Owns the pace alone: how much of it a peer may have in a turn is for connections.ts to say.

import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';

type Done = (error?: Error | null) => void;

/** Stands between a socket and node:http2. Destroying it destroys the socket, and the other way round. */
export class PacedSocket extends Duplex {
  /** What node:http2 has been given. */
  passedBytes = 0;
  /** Asked once a turn, when there is something to pass on: how many bytes may go. 0: the connection has been ended. */
  turnBytes: () => number = () => Infinity;
  readonly #socket: Socket;
  #isWanted = false;
  /** Has passed on its allowance of this turn. */
  #isSpent = false;

  constructor(socket: Socket) {
    super();
    this.#socket = socket;
    // node:http2 asks for it, and finds no socket here to ask.
    socket.setNoDelay(true);
    // Read by us, it holds one read of 64 kB at most.
    socket.on('readable', () => this.#pass());
    socket.once('end', () => this.push(null));
    socket.once('error', (error) => this.destroy(error));
    socket.once('close', () => this.destroy());
  }

  get remoteAddress(): string | undefined {
    return this.#socket.remoteAddress;
  }

  override _read(): void {
    this.#isWanted = true;
    this.#pass();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: Done): void {
    this.#socket.write(chunk, done);
  }

  override _writev(chunks: readonly { readonly chunk: Buffer }[], done: Done): void {
    this.#socket.write(Buffer.concat(chunks.map(({ chunk }) => chunk)), done);
  }

  override _final(done: Done): void {
    this.#socket.end(() => done());
  }

  override _destroy(error: Error | null, done: Done): void {
    this.#socket.destroy();
    done(error);
  }

  #pass(): void {
    if (!this.#isWanted || this.#isSpent || this.destroyed) {
      return;
    }
    const available = this.#socket.readableLength;
    const maxBytes = available === 0 ? 0 : this.turnBytes();
    // A read without a size detects the end.
    const portion = this.#socket.read(available === 0 ? undefined : Math.min(available, maxBytes));
    if (!(portion instanceof Buffer)) {
      return;
    }
    if (portion.length === maxBytes) {
      this.#isSpent = true;
      setImmediate(() => {
        this.#isSpent = false;
        this.#pass();
      });
    }
    this.passedBytes += portion.length;
    this.#isWanted = this.push(portion);
  }
}
