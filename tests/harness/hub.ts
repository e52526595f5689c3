// A Hugging Face hub on loopback, as far as fetching a model needs one: a repository's commit, its files with their
// digests, and the files by ranges. Serves directories of this machine. It can break off, return corrupt data, and
// require a token.

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';

/** A request for a file's content: from which byte on. */
interface HubRead {
  readonly path: string;
  readonly from: number;
}

export interface TestHubOptions {
  /** Directory by repository name. */
  readonly repositories: Readonly<Record<string, string>>;
  readonly token?: string;
}

/** A running hub. Close it. */
export interface TestHub {
  readonly url: string;
  /** Every request for content, in order, without the one-byte looks at a file's size. */
  readonly reads: readonly HubRead[];
  /** From which on the next answers with this file's content break off: after so many bytes of each answer. */
  breakOff(path: string, afterBytes: number, times: number): void;
  /** After so many bytes an answer with this file's content says nothing more, and stays open. */
  stall(path: string, afterBytes: number): void;
  /** Answers with this file have wrong bytes, so many times. */
  lie(path: string, times: number): void;
  close(): Promise<void>;
}

const smallFileBytes = 1_000_000;

/** Starts a hub on a free port. */
export async function startTestHub(options: TestHubOptions): Promise<TestHub> {
  const reads: HubRead[] = [];
  const breaks = new Map<string, { readonly afterBytes: number; times: number }>();
  const stalls = new Map<string, number>();
  const lies = new Map<string, number>();

  const sendFile = (request: IncomingMessage, response: ServerResponse, path: string, file: string): void => {
    const content = readFileSync(file);
    const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '') ?? [];
    const from = Number(first ?? 0);
    const to =
      last === undefined || last === '' ? content.length : Math.min(Number(last) + 1, content.length);
    response.setHeader('ETag', `"${createHash('sha256').update(content).digest('hex')}"`);
    if (first !== undefined) {
      response.setHeader('Content-Range', `bytes ${from}-${to - 1}/${content.length}`);
    }
    const body = content.subarray(from, to);
    response.writeHead(first === undefined ? 200 : 206, { 'Content-Length': body.length });
    if (first === '0' && last === '0') {
      response.end(body);
      return;
    }
    reads.push({ path, from });
    const lieTimes = lies.get(path) ?? 0;
    const breakOff = breaks.get(path);
    const stallAfter = stalls.get(path);
    if (lieTimes > 0) {
      lies.set(path, lieTimes - 1);
      response.end(Buffer.alloc(body.length, 7));
    } else if (stallAfter !== undefined) {
      response.write(body.subarray(0, stallAfter));
    } else if (breakOff !== undefined && breakOff.times > 0) {
      breakOff.times--;
      response.write(body.subarray(0, breakOff.afterBytes), () => response.destroy());
    } else {
      response.end(body);
    }
  };

  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url ?? '/', 'http://hub').pathname);
    const [, repository = '', kind = '', rest = ''] =
      /^(?:\/api\/models)?\/([^/]+\/[^/]+)\/(revision|tree|resolve)\/(.+)$/.exec(path) ?? [];
    const directory = options.repositories[repository];
    const mayRead =
      options.token === undefined || request.headers.authorization === `Bearer ${options.token}`;
    const [revision = '', ...below] = rest.split('/');
    const commit = commitOf(repository);
    const knowsRevision = revision === commit || (kind === 'revision' && revision === 'main');
    if (directory === undefined || !mayRead || !knowsRevision) {
      response.writeHead(404, { 'Content-Type': 'application/json', 'X-Error-Code': 'RepoNotFound' });
      response.end(JSON.stringify({ error: 'Repository not found' }));
    } else if (kind === 'revision') {
      sendJson(response, { _id: 'x', id: repository, sha: commit, lastModified: '2025-01-01T00:00:00.000Z' });
    } else if (kind === 'tree') {
      sendJson(response, describe(directory));
    } else {
      sendFile(request, response, below.join('/'), join(directory, ...below));
    }
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    reads,
    breakOff: (path, afterBytes, times) => void breaks.set(path, { afterBytes, times }),
    stall: (path, afterBytes) => void stalls.set(path, afterBytes),
    lie: (path, times) => void lies.set(path, times),
    close: async () => {
      server.close();
      server.closeAllConnections();
      await once(server, 'close');
    },
  };
}

function commitOf(repository: string): string {
  return createHash('sha1').update(repository).digest('hex');
}

function sendJson(response: ServerResponse, value: unknown): void {
  response.writeHead(200, { 'Content-Type': 'application/json' }).end(JSON.stringify(value));
}

/** The top of a repository: git's own digest of small files, that of Git LFS for large ones. */
function describe(directory: string): unknown[] {
  return readdirSync(directory).map((path) => {
    const content = readFileSync(join(directory, path));
    const oid = createHash('sha1').update(`blob ${content.length}\0`).update(content).digest('hex');
    const lfs = {
      oid: createHash('sha256').update(content).digest('hex'),
      size: content.length,
      pointerSize: 134,
    };
    const entry = { type: 'file', path, size: content.length, oid };
    return content.length < smallFileBytes ? entry : { ...entry, lfs };
  });
}
