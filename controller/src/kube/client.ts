// The API server's verbs, the same for every type of object. Owns paging, the media types of patches, the lines of a
// watch; transport.ts owns the connection. Errors are ClusterErrors: not_found; aborted (another client was first:
// see hasReason); invalid_argument with the fields; permission_denied; unavailable (retry, with retryAfterMs).

import { KubeConfig } from '@kubernetes/client-node';
import { ClusterError } from '@mimo/core/process/errors';

import { ApiClock } from './api-clock.ts';
import { hasReason, isApiStatus, statusError } from './api-status.ts';
import { resourcePath, type KubeObject, type ObjectManifest, type ResourceType } from './resource.ts';
import { connectionError, Transport } from './transport.ts';

/** Owns the fields that `apply` sets. */
export const fieldOwner = 'mimo-controller';

export interface Selection {
  /** Such as `app=worker,tier!=test`. */
  readonly labelSelector?: string;
  readonly fieldSelector?: string;
}

/** A collection as of one resource version. */
export interface ObjectList<T> {
  readonly items: readonly T[];
  /** Where a watch continues. */
  readonly resourceVersion: string;
}

export interface WatchOptions extends Selection {
  /** Changes after this version are reported. */
  readonly resourceVersion: string;
  /** The server ends the watch after this; seconds, as the API has it. */
  readonly timeoutSeconds: number;
}

/** One line of a watch. A bookmark only reports the watch's position. */
export type WatchEvent<T> =
  | { readonly type: 'ADDED' | 'MODIFIED' | 'DELETED'; readonly object: T }
  | { readonly type: 'BOOKMARK'; readonly resourceVersion: string };

/** One change of a JSON patch. */
export interface JsonPatchOperation {
  readonly op: 'add' | 'remove' | 'replace' | 'test';
  readonly path: string;
  readonly value?: unknown;
}

/** A part of the object with its own path and permission. */
export type Subresource = 'status' | 'scale';

export interface DeleteOptions {
  /** Rejected with `Conflict` if another object has this name now. */
  readonly uid?: string;
  readonly resourceVersion?: string;
  readonly gracePeriodSeconds?: number;
  readonly propagation?: 'Foreground' | 'Background' | 'Orphan';
}

export interface KubeClientOptions {
  /** Default: the namespace of the kubeconfig's context; in a cluster, the pod's own. */
  readonly namespace?: string;
  /** Time limit of one request, or of the start of a watch. */
  readonly timeoutMs?: number;
  /** Objects per request of a list. */
  readonly pageSize?: number;
}

/** Finds the API server: from a kubeconfig file, or without one as a pod of its cluster. */
export function loadKubeConfig(file: string | undefined): KubeConfig {
  const config = new KubeConfig();
  try {
    if (file === undefined) {
      config.loadFromCluster();
    } else {
      config.loadFromFile(file);
    }
  } catch (error) {
    const { message } = ClusterError.from(error);
    throw new ClusterError('invalid_argument', `kubeconfig: ${message}`, { cause: error });
  }
  return config;
}

/** Talks to one API server about one namespace and the cluster-wide types. Close it to free its connections. */
export class KubeClient {
  readonly namespace: string;
  /** The server's time. */
  readonly clock = new ApiClock();
  readonly #pageSize: number;
  readonly #transport: Transport;

  constructor(config: KubeConfig, options: KubeClientOptions = {}) {
    const context = config.getContextObject(config.getCurrentContext());
    this.namespace = options.namespace ?? context?.namespace ?? 'default';
    this.#pageSize = options.pageSize ?? 500;
    this.#transport = new Transport(config, {
      timeoutMs: options.timeoutMs ?? 30_000,
      userAgent: fieldOwner,
      clock: this.clock,
    });
  }

  /** Reads one object, as of now. */
  async get<T extends KubeObject = KubeObject>(
    type: ResourceType,
    name: string,
    signal: AbortSignal,
  ): Promise<T> {
    const path = this.#path(type, {}, name);
    return (await this.#transport.json({ method: 'GET', path }, signal)) as T;
  }

  /** Reads the whole collection, page by page, as of one moment. */
  async list<T extends KubeObject = KubeObject>(
    type: ResourceType,
    selection: Selection,
    signal: AbortSignal,
  ): Promise<ObjectList<T>> {
    try {
      return await this.#list<T>(type, { ...selection, limit: this.#pageSize }, signal);
    } catch (error) {
      // The version of the first page can expire. A list in one piece cannot.
      if (!hasReason(error, 'Expired')) {
        throw error;
      }
      return await this.#list<T>(type, { ...selection }, signal);
    }
  }

  /**
   * Follows a collection from a version on. Ends when the server ends it, which it does by itself after
   * `timeoutSeconds`; fails with reason `Expired` if the version is too old, and then needs a new list.
   */
  async *watch<T extends KubeObject = KubeObject>(
    type: ResourceType,
    options: WatchOptions,
    signal: AbortSignal,
  ): AsyncGenerator<WatchEvent<T>, void, undefined> {
    const path = this.#path(type, { ...options, watch: true, allowWatchBookmarks: true });
    const doing = `watch of ${type.plural}`;
    const response = await this.#transport.stream({ method: 'GET', path }, signal);
    try {
      for await (const line of linesOf(response)) {
        yield readEvent<T>(type, line, doing);
      }
    } catch (error) {
      throw signal.aborted ? ClusterError.from(signal.reason) : connectionError(doing, error);
    } finally {
      response.destroy();
    }
  }

  /** Creates an object; fails with reason `AlreadyExists` if the name is in use. */
  async create<T extends KubeObject = KubeObject>(
    type: ResourceType,
    object: ObjectManifest,
    signal: AbortSignal,
  ): Promise<T> {
    const path = this.#path(type, { fieldManager: fieldOwner });
    return (await this.#transport.json({ method: 'POST', path, body: object }, signal)) as T;
  }

  /** Server-side apply: sets and owns the given fields, removes fields given before but not now, keeps others. */
  async apply<T extends KubeObject = KubeObject>(
    type: ResourceType,
    object: ObjectManifest,
    options: { readonly subresource?: Subresource },
    signal: AbortSignal,
  ): Promise<T> {
    const query = { fieldManager: fieldOwner, force: true };
    const path = this.#path(type, query, object.metadata.name, options.subresource);
    const contentType = 'application/apply-patch+yaml';
    return (await this.#transport.json({ method: 'PATCH', path, contentType, body: object }, signal)) as T;
  }

  /**
   * Patches: a list is a JSON patch, an object a merge patch, where null removes a field. A merge patch with
   * `metadata.resourceVersion`, or a JSON patch with a `test`, fails if the object has changed since.
   */
  async patch<T extends KubeObject = KubeObject>(
    type: ResourceType,
    name: string,
    patch: readonly JsonPatchOperation[] | Readonly<Record<string, unknown>>,
    options: { readonly subresource?: Subresource },
    signal: AbortSignal,
  ): Promise<T> {
    const path = this.#path(type, { fieldManager: fieldOwner }, name, options.subresource);
    const contentType = Array.isArray(patch) ? 'application/json-patch+json' : 'application/merge-patch+json';
    return (await this.#transport.json({ method: 'PATCH', path, contentType, body: patch }, signal)) as T;
  }

  /** Requests an object's deletion; with finalizers or a grace period it still exists for a while. */
  async delete(type: ResourceType, name: string, options: DeleteOptions, signal: AbortSignal): Promise<void> {
    const { uid, resourceVersion, gracePeriodSeconds, propagation } = options;
    const body = {
      apiVersion: 'v1',
      kind: 'DeleteOptions',
      preconditions: { uid, resourceVersion },
      gracePeriodSeconds,
      propagationPolicy: propagation,
    };
    await this.#transport.json({ method: 'DELETE', path: this.#path(type, {}, name), body }, signal);
  }

  /** Frees the connections; running calls fail. */
  close(): void {
    this.#transport.close();
  }

  async #list<T extends KubeObject>(
    type: ResourceType,
    query: Selection & { readonly limit?: number },
    signal: AbortSignal,
  ): Promise<ObjectList<T>> {
    const items: T[] = [];
    let page: ListPage | undefined;
    do {
      const path = this.#path(type, { ...query, continue: page?.metadata.continue });
      page = (await this.#transport.json({ method: 'GET', path }, signal)) as ListPage;
      // Objects in a list have no apiVersion or kind.
      const { apiVersion, kind } = type;
      items.push(...page.items.map((item) => ({ apiVersion, kind, ...item }) as T));
    } while (page.metadata.continue);
    return { items, resourceVersion: page.metadata.resourceVersion };
  }

  #path(
    type: ResourceType,
    query: Readonly<Record<string, string | number | boolean | undefined>>,
    ...rest: readonly (string | undefined)[]
  ): string {
    const given = Object.entries(query).flatMap(([key, value]) =>
      value === undefined || value === '' ? [] : [[key, String(value)]],
    );
    const path = resourcePath(type, this.namespace, ...rest.filter((part) => part !== undefined));
    return given.length === 0 ? path : `${path}?${new URLSearchParams(given).toString()}`;
  }
}

interface ListPage {
  readonly metadata: { readonly resourceVersion: string; readonly continue?: string };
  readonly items: readonly object[];
}

const newline = 0x0a;

/** The lines of a stream; an unfinished last line means that the stream was cut off. */
async function* linesOf(stream: AsyncIterable<Buffer>): AsyncGenerator<string, void, undefined> {
  let parts: Buffer[] = [];
  for await (const chunk of stream) {
    let from = 0;
    for (let end = chunk.indexOf(newline); end !== -1; end = chunk.indexOf(newline, from)) {
      parts.push(chunk.subarray(from, end));
      const line = Buffer.concat(parts).toString('utf8');
      parts = [];
      from = end + 1;
      if (line !== '') {
        yield line;
      }
    }
    if (from < chunk.length) {
      parts.push(chunk.subarray(from));
    }
  }
  if (parts.length > 0) {
    throw new ClusterError('unavailable', 'the stream was cut off within a line');
  }
}

function readEvent<T extends KubeObject>(type: ResourceType, line: string, doing: string): WatchEvent<T> {
  let event: { readonly type: string; readonly object: unknown };
  try {
    event = JSON.parse(line) as typeof event;
  } catch (error) {
    throw new ClusterError('data_loss', `${doing}: a line is not valid JSON`, { cause: error });
  }
  switch (event.type) {
    case 'ADDED':
    case 'MODIFIED':
    case 'DELETED':
      return { type: event.type, object: event.object as T };
    case 'BOOKMARK':
      return { type: 'BOOKMARK', resourceVersion: (event.object as T).metadata.resourceVersion };
    default:
      throw isApiStatus(event.object)
        ? statusError(event.object, doing)
        : new ClusterError('data_loss', `${doing}: a line of type ${event.type} about ${type.kind}`);
  }
}
