// HTTP to the API server. Of @kubernetes/client-node only KubeConfig is used, for what is tedious and never ours: TLS,
// proxies, exec plugins, token files that rotate. The rest of it hides the sockets, and its informers stop at errors;
// over node:https every request has a time limit, an abort and an error of ours. Knows no resources.

import { once } from 'node:events';
import http from 'node:http';
import https from 'node:https';

import type { KubeConfig } from '@kubernetes/client-node';
import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';

import type { ApiClock } from './api-clock.ts';
import { isApiStatus, statusError } from './api-status.ts';
import { redactStatus } from './redaction.ts';

/** One request; the path includes the query. */
export interface ApiRequest {
  readonly method: 'GET' | 'POST' | 'PATCH' | 'DELETE';
  readonly path: string;
  readonly body?: unknown;
  readonly contentType?: string;
}

export interface TransportOptions {
  /** How long a whole request, or the beginning of a stream, may take. */
  readonly timeoutMs: number;
  readonly userAgent: string;
  /** Hears the time of every answer. */
  readonly clock: ApiClock;
}

/** A reply of 429 is waited out so many times within a call, and each time no longer than this. */
const maxThrottled = 4;
const maxThrottledWaitMs = 10_000;

interface Credentials extends https.RequestOptions {
  headers: Record<string, string>;
}

/** One request's time limit, and its place under the caller's signal. */
class Exchange {
  readonly #outer: AbortSignal;
  readonly #inner = new AbortController();
  readonly #timer: NodeJS.Timeout;
  timedOut = false;

  constructor(outer: AbortSignal, timeoutMs: number) {
    this.#outer = outer;
    outer.addEventListener('abort', this.#abort, { once: true });
    this.#timer = setTimeout(() => {
      this.timedOut = true;
      this.#inner.abort();
    }, timeoutMs);
    if (outer.aborted) {
      this.#abort();
    }
  }

  get signal(): AbortSignal {
    return this.#inner.signal;
  }

  stopTimer(): void {
    clearTimeout(this.#timer);
  }

  /** Leaves the caller's signal, which may live as long as the process. */
  end(): void {
    this.stopTimer();
    this.#outer.removeEventListener('abort', this.#abort);
  }

  readonly #abort = (): void => this.#inner.abort(this.#outer.reason);
}

/** The connections to one API server under one identity. */
export class Transport {
  readonly #config: KubeConfig;
  readonly #options: TransportOptions;
  // The pool is keyed by the TLS material too: connections under a certificate that was replaced are not used again.
  readonly #secureAgent = new https.Agent({ keepAlive: true, maxFreeSockets: 8 });
  readonly #plainAgent = new http.Agent({ keepAlive: true, maxFreeSockets: 8 });

  constructor(config: KubeConfig, options: TransportOptions) {
    this.#config = config;
    this.#options = options;
  }

  /** Sends a request and reads its answer. 429 is retried a few times, as slowly as the server asks. */
  async json(request: ApiRequest, signal: AbortSignal): Promise<unknown> {
    for (let throttled = 0; ; throttled += 1) {
      const exchange = new Exchange(signal, this.#options.timeoutMs);
      try {
        return parseBody(request, await readBody(await this.#open(request, exchange.signal)));
      } catch (error) {
        const failure = this.#failure(request, exchange, error);
        const waitMs = throttleOf(failure);
        if (waitMs === undefined || throttled === maxThrottled) {
          throw failure;
        }
        await pause(Math.min(waitMs, maxThrottledWaitMs) * (1 + 0.25 * Math.random()), signal);
      } finally {
        exchange.end();
      }
    }
  }

  /** Sends a request whose answer goes on; the signal, or destroying what is returned, ends it. */
  async stream(request: ApiRequest, signal: AbortSignal): Promise<http.IncomingMessage> {
    const exchange = new Exchange(signal, this.#options.timeoutMs);
    try {
      const response = await this.#open(request, exchange.signal);
      exchange.stopTimer();
      response.once('close', () => exchange.end());
      return response;
    } catch (error) {
      exchange.end();
      throw this.#failure(request, exchange, error);
    }
  }

  /** Closes every connection; what is under way fails. */
  close(): void {
    this.#secureAgent.destroy();
    this.#plainAgent.destroy();
  }

  /** Sends a request and waits for the head of the answer; an answer that is no success is read and thrown. */
  async #open(request: ApiRequest, signal: AbortSignal): Promise<http.IncomingMessage> {
    const cluster = this.#config.getCurrentCluster();
    if (cluster === null) {
      throw new ClusterError('invalid_argument', 'the kubeconfig names no cluster');
    }
    const credentials = await this.#credentials();
    signal.throwIfAborted();
    const url = new URL(cluster.server.replace(/\/$/, '') + request.path);
    const secure = url.protocol === 'https:';
    const ownAgent = secure ? this.#secureAgent : this.#plainAgent;
    const body = request.body === undefined ? undefined : JSON.stringify(request.body);
    const outgoing = (secure ? https : http).request(url, {
      ...credentials,
      agent: cluster.proxyUrl === undefined ? ownAgent : credentials.agent,
      method: request.method,
      headers: {
        ...credentials.headers,
        accept: 'application/json',
        'user-agent': this.#options.userAgent,
        ...(body !== undefined && {
          'content-type': request.contentType ?? 'application/json',
          'content-length': Buffer.byteLength(body),
        }),
      },
      signal,
    });
    // An error after the head reaches whoever reads the body; without a listener it would end the process.
    outgoing.on('error', () => undefined);
    const askedMs = performance.now();
    outgoing.end(body);
    let response: http.IncomingMessage;
    try {
      [response] = (await once(outgoing, 'response')) as [http.IncomingMessage];
    } catch (error) {
      // A kept connection can have been closed by the server in the same moment. Only a read may be sent twice.
      if (request.method === 'GET' && outgoing.reusedSocket && !signal.aborted) {
        return await this.#open(request, signal);
      }
      throw error;
    }
    this.#options.clock.observe(response.headers.date, askedMs, performance.now());
    if (response.statusCode !== undefined && response.statusCode < 300) {
      return response;
    }
    throw refusal(request, response, {
      text: await readBody(response),
      credentials: [credentials.headers['Authorization']?.replace(/^\w+ /, '') ?? '', credentials.auth ?? ''],
    });
  }

  /** TLS material and headers as they are now: files are read again, plugins run again where theirs expired. */
  async #credentials(): Promise<Credentials> {
    const options: Credentials = { headers: {} };
    try {
      await this.#config.applyToHTTPSOptions(options);
      return options;
    } catch (error) {
      const { message } = ClusterError.from(error);
      throw new ClusterError('unavailable', `credentials for the API server: ${message}`, { cause: error });
    }
  }

  /** What an exchange failed with, as an error of ours. */
  #failure(request: ApiRequest, exchange: Exchange, error: unknown): ClusterError {
    if (exchange.timedOut) {
      // The idle connections lead to the same silent peer: the next request opens its own.
      this.#closeIdle();
      const text = `${describe(request)}: no answer in ${this.#options.timeoutMs} ms`;
      return new ClusterError('unavailable', text, { cause: error });
    }
    return exchange.signal.aborted
      ? ClusterError.from(exchange.signal.reason)
      : connectionError(describe(request), error);
  }

  #closeIdle(): void {
    for (const sockets of [this.#secureAgent.freeSockets, this.#plainAgent.freeSockets]) {
      for (const socket of Object.values(sockets).flatMap((idle) => idle ?? [])) {
        socket.destroy();
      }
    }
  }
}

async function readBody(response: http.IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  for await (const chunk of response) {
    chunks.push(chunk as Buffer);
  }
  return Buffer.concat(chunks).toString('utf8');
}

function parseBody(request: ApiRequest, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ClusterError('data_loss', `${describe(request)}: the answer is no JSON`, { cause: error });
  }
}

function describe({ method, path }: ApiRequest): string {
  return `${method} ${path.replace(/\?.*/, '')}`;
}

function refusal(
  request: ApiRequest,
  response: http.IncomingMessage,
  { text, credentials }: { readonly text: string; readonly credentials: readonly string[] },
): ClusterError {
  const code = response.statusCode ?? 0;
  const seconds = Number(response.headers['retry-after']);
  const retryAfterMs = Number.isFinite(seconds) ? seconds * 1000 : undefined;
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    // Proxies, and the API server where it sheds load, answer in plain text.
    body = undefined;
  }
  const status = isApiStatus(body) ? { ...body, code } : { code, message: text.trim().slice(0, 500) };
  const redacted = redactStatus(status, { body: request.body, credentials });
  return statusError(redacted, describe(request), retryAfterMs);
}

function throttleOf(error: unknown): number | undefined {
  const throttled =
    error instanceof ClusterError && isApiStatus(error.cause) && error.cause.code === 429 ? error : undefined;
  return throttled === undefined ? undefined : (throttled.detail.retryAfterMs ?? 1000);
}

/** What sockets fail with is worth another try; errors of ours stay what they are. */
export function connectionError(doing: string, error: unknown): ClusterError {
  if (error instanceof ClusterError) {
    return error;
  }
  const { message } = ClusterError.from(error);
  return new ClusterError('unavailable', `${doing}: ${message}`, { cause: error });
}
