// HTTP to the API server. Of @kubernetes/client-node only KubeConfig is used: TLS, proxies, exec plugins, rotating
// token files. The rest of it hides the sockets, and its informers stop at errors; over node:https every request has
// a time limit, an abort signal and a ClusterError. Independent of resources.

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
  /** Time limit of a whole request, or of the start of a stream. */
  readonly timeoutMs: number;
  readonly userAgent: string;
  /** Gets the time of every answer. */
  readonly clock: ApiClock;
}

/** How often a call retries after a reply of 429, and the longest wait before each retry. */
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
  // The pool is keyed by the TLS material too: connections with a replaced certificate are not reused.
  readonly #secureAgent = new https.Agent({ keepAlive: true, maxFreeSockets: 8 });
  readonly #plainAgent = new http.Agent({ keepAlive: true, maxFreeSockets: 8 });

  constructor(config: KubeConfig, options: TransportOptions) {
    this.#config = config;
    this.#options = options;
  }

  /** Sends a request and reads its answer. Retries a 429 a few times, after the delay that the server requests. */
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

  /** Sends a request with a streamed answer; the signal, or destroying the returned stream, ends it. */
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

  /** Closes every connection; running requests fail. */
  close(): void {
    this.#secureAgent.destroy();
    this.#plainAgent.destroy();
  }

  /** Sends a request and waits for the head of the answer; throws an unsuccessful answer as an error. */
  async #open(request: ApiRequest, signal: AbortSignal): Promise<http.IncomingMessage> {
    const cluster = this.#config.getCurrentCluster();
    if (cluster === null) {
      throw new ClusterError('invalid_argument', 'the kubeconfig has no cluster');
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
    // An error after the head reaches the body's reader; without a listener it would end the process.
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

  /** Current TLS material and headers: files are read again, plugins run again if their credentials expired. */
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

  /** The failure of an exchange as a ClusterError. */
  #failure(request: ApiRequest, exchange: Exchange, error: unknown): ClusterError {
    if (exchange.timedOut) {
      // Idle connections lead to the same dead peer: the next request opens its own.
      this.#closeIdle();
      const text = `${describe(request)}: no response within ${this.#options.timeoutMs} ms`;
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
    throw new ClusterError('data_loss', `${describe(request)}: the response is not valid JSON`, {
      cause: error,
    });
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
    // Proxies answer in plain text, and so does the API server when it sheds load.
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

/** Socket errors can be retried; ClusterErrors stay as they are. */
export function connectionError(doing: string, error: unknown): ClusterError {
  if (error instanceof ClusterError) {
    return error;
  }
  const { message } = ClusterError.from(error);
  return new ClusterError('unavailable', `${doing}: ${message}`, { cause: error });
}
