// A checkpoint from a Hugging Face hub into a directory: only the files that MiMo needs, each checked against the hub's
// digest. Owns the directory during the download: of several concurrent callers, on a shared volume too, one fetches
// and the others wait, and an interrupted fetch resumes. Talks to the hub only through @huggingface/hub.

import { mkdir, open, readdir, readFile, rename, rm, statfs, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import { downloadFile, HubApiError, listFiles, modelInfo } from '@huggingface/hub';

import { beforeAbort, pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { withFileLock } from '@mimo/core/process/file-lock';

import { openCheckpoint, readModelConfig } from './checkpoint.ts';
import { hubFileOf, isNeeded, isWeights, isWhole, sizeOf, type HubFile } from './hub-file.ts';

/** What to fetch, and where to. */
export interface HubFetch {
  /** Such as `XiaomiMiMo/MiMo-7B-RL`. */
  readonly repository: string;
  /** A branch, tag or commit. Resolved once: a complete directory is never fetched again. */
  readonly revision: string;
  /** Default: the library's own. */
  readonly endpoint?: string;
  readonly token?: string;
  readonly directory: string;
  readonly onProgress?: (progress: HubProgress) => void;
}

/** Bytes in the directory so far, and in total. */
export interface HubProgress {
  readonly file: string;
  readonly doneBytes: number;
  readonly totalBytes: number;
}

/** Written last: marks the directory as complete and lists its contents. */
const markerFile = 'fetched.json';
/** One connection rarely fills a line; more would only split it. */
const connections = 4;
/** Attempts in a row without new data before giving up. */
const maxAttempts = 5;
const retryMs = 1_000;
/** A connection without new data for this long is closed. */
const stallMs = 60_000;

/**
 * Fetches a checkpoint into the directory, unless it is already there. Fails with `not_found` if the hub has no such
 * model or revision (or does not show it to this token), `invalid_argument` if it is not a MiMo checkpoint, `data_loss`
 * if a file does not match the hub's digest, `resource_exhausted` if the disk is too small, `unavailable` if the
 * hub cannot be reached. The signal cancels; the next call resumes from the bytes on disk.
 */
export async function fetchCheckpoint(request: HubFetch, signal: AbortSignal): Promise<void> {
  if (await isFetched(request)) {
    return;
  }
  await mkdir(dirname(request.directory), { recursive: true });
  const fetchUnlessDone = async (): Promise<void> => {
    if (!(await isFetched(request))) {
      await new Fetching(request, signal).run();
    }
  };
  await withFileLock(`${request.directory}.lock`, fetchUnlessDone, signal);
}

async function isFetched({ directory, repository, revision }: HubFetch): Promise<boolean> {
  const text = await readFile(join(directory, markerFile), 'utf8').catch(() => '{}');
  const marker = JSON.parse(text) as { readonly repository?: string; readonly revision?: string };
  return marker.repository === repository && marker.revision === revision;
}

/** One fetch, by the process that holds the lock. */
class Fetching {
  readonly #request: HubFetch;
  readonly #signal: AbortSignal;
  readonly #failed = new AbortController();
  /** Common arguments of every library call. */
  readonly #access: {
    readonly fetch: typeof fetch;
    readonly hubUrl?: string;
    readonly accessToken?: string;
  };
  readonly #doneBytes = new Map<string, number>();
  #totalBytes = 0;

  constructor(request: HubFetch, signal: AbortSignal) {
    this.#request = request;
    this.#signal = AbortSignal.any([signal, this.#failed.signal]);
    this.#access = {
      fetch: (input, init) => fetch(input, { ...init, signal: this.#signal }),
      ...(request.endpoint === undefined ? {} : { hubUrl: request.endpoint }),
      ...(request.token === undefined ? {} : { accessToken: request.token }),
    };
  }

  async run(): Promise<void> {
    const { directory, repository, revision } = this.#request;
    await mkdir(directory, { recursive: true });
    // A branch may move while its files are fetched: all of them are taken from one commit.
    const commit = await this.#ask(() => this.#findCommit());
    const files = await this.#ask(() => this.#list(commit));
    this.#totalBytes = files.reduce((sum, { bytes }) => sum + bytes, 0);
    await this.#assertSpace(files);
    // The small files first: they reveal another kind of model before gigabytes are fetched.
    await this.#fetchAll(
      files.filter((file) => !isWeights(file)),
      commit,
    );
    await readModelConfig(directory);
    if (!files.some(isWeights)) {
      throw new ClusterError('invalid_argument', `${repository} has no safetensors weights`);
    }
    await this.#fetchAll(files.filter(isWeights), commit);
    await openCheckpoint(directory);
    const stale = (await readdir(directory)).filter((name) => name.endsWith('.partial'));
    await Promise.all(stale.map((name) => rm(join(directory, name))));
    const marker = JSON.stringify({ repository, revision, commit });
    await writeFile(join(directory, `${markerFile}.new`), marker, { flush: true });
    await rename(join(directory, `${markerFile}.new`), join(directory, markerFile));
  }

  async #findCommit(): Promise<string> {
    const { repository: name, revision } = this.#request;
    const { sha } = await modelInfo({ ...this.#access, name, revision, additionalFields: ['sha'] });
    return sha;
  }

  async #list(commit: string): Promise<HubFile[]> {
    const files: HubFile[] = [];
    const { repository: repo } = this.#request;
    for await (const entry of listFiles({ ...this.#access, repo, revision: commit })) {
      if (entry.type === 'file' && isNeeded(entry.path)) {
        files.push(hubFileOf(entry));
      }
    }
    if (!files.some(({ path }) => path === 'config.json')) {
      throw new ClusterError('invalid_argument', `${repo} is not a MiMo checkpoint: it has no config.json`);
    }
    return files;
  }

  async #assertSpace(files: readonly HubFile[]): Promise<void> {
    const { directory } = this.#request;
    const kept = await Promise.all((await readdir(directory)).map((name) => sizeOf(join(directory, name))));
    const missingBytes =
      files.reduce((sum, { bytes }) => sum + bytes, 0) - kept.reduce((sum, bytes) => sum + bytes, 0);
    const { bavail, bsize } = await statfs(directory);
    if (missingBytes > bavail * bsize) {
      throw new ClusterError(
        'resource_exhausted',
        `${directory}: needs ${missingBytes} more bytes of disk, ${bavail * bsize} are free`,
      );
    }
  }

  async #fetchAll(files: readonly HubFile[], commit: string): Promise<void> {
    const next = files.values();
    const fetchNext = async (): Promise<void> => {
      try {
        for (const file of next) {
          await this.#fetchFile(file, commit);
        }
      } catch (error) {
        this.#failed.abort(error);
        throw error;
      }
    };
    const results = await Promise.allSettled(Array.from({ length: connections }, fetchNext));
    if (results.some(({ status }) => status === 'rejected')) {
      throw ClusterError.from(this.#signal.reason);
    }
  }

  /** Fetches under a temporary name, so a file at its final name is always complete and checked. */
  async #fetchFile(file: HubFile, commit: string): Promise<void> {
    const target = join(this.#request.directory, file.path);
    const partial = `${target}.${file.digest.hex.slice(0, 16)}.partial`;
    if (!(await isWhole(target, file))) {
      await this.#download(file, partial, commit);
      if (!(await isWhole(partial, file))) {
        // For example, a proxy mixed in a piece of another file: start over, once.
        await rm(partial);
        await this.#download(file, partial, commit);
      }
      if (!(await isWhole(partial, file))) {
        await rm(partial);
        throw new ClusterError(
          'data_loss',
          `${file.path} of ${this.#request.repository} does not match the hub's ${file.digest.kind} digest`,
        );
      }
      await rename(partial, target);
    }
    this.#tell(file, file.bytes);
  }

  /** Completes a partial file from where it ends, over as many connections as needed. */
  async #download(file: HubFile, partial: string, commit: string): Promise<void> {
    const append = async (): Promise<void> => {
      const begin = await sizeOf(partial);
      if (file.bytes === 0) {
        await writeFile(partial, '');
      } else if (begin < file.bytes) {
        await this.#append(file, { partial, begin, commit });
      }
    };
    await this.#ask(append, () => sizeOf(partial));
  }

  async #append(
    file: HubFile,
    at: { readonly partial: string; readonly begin: number; readonly commit: string },
  ): Promise<void> {
    const { repository: repo } = this.#request;
    // Not by Xet's own protocol: it cannot resume in the middle of a file.
    const options = { ...this.#access, repo, path: file.path, revision: at.commit, xet: false };
    const blob = await downloadFile(options);
    if (blob === null) {
      throw new ClusterError('not_found', `${repo} no longer has ${file.path}`);
    }
    const reader = blob.slice(at.begin, file.bytes).stream().getReader();
    const output = await open(at.partial, 'a');
    try {
      for (let size = at.begin; size < file.bytes;) {
        const stalled = AbortSignal.timeout(stallMs);
        const until = AbortSignal.any([this.#signal, stalled]);
        const { done, value } = await beforeAbort(reader.read(), until);
        if (done) {
          throw new ClusterError('unavailable', `${file.path} ended after ${size} of ${file.bytes} bytes`);
        }
        await output.appendFile(value);
        size += value.length;
        this.#tell(file, size);
      }
      await output.datasync();
    } finally {
      await output.close();
      await reader.cancel().catch(() => undefined);
    }
  }

  #tell({ path }: HubFile, bytes: number): void {
    this.#doneBytes.set(path, bytes);
    const doneBytes = [...this.#doneBytes.values()].reduce((sum, each) => sum + each, 0);
    this.#request.onProgress?.({ file: path, doneBytes, totalBytes: this.#totalBytes });
  }

  /**
   * Retries a request while the hub may still answer. `progress` grows with each attempt that received data.
   */
  async #ask<Result>(act: () => Promise<Result>, progress = async (): Promise<number> => 0): Promise<Result> {
    let before = await progress();
    for (let attempt = 1; ; attempt++) {
      try {
        return await act();
      } catch (error) {
        this.#signal.throwIfAborted();
        const after = await progress();
        const failure = this.#failureOf(error);
        if (failure.code !== 'unavailable' || (after <= before && attempt >= maxAttempts)) {
          throw failure;
        }
        attempt = after > before ? 0 : attempt;
        before = after;
      }
      await pause(retryMs * attempt, this.#signal);
    }
  }

  #failureOf(error: unknown): ClusterError {
    const { repository, revision } = this.#request;
    if (error instanceof ClusterError) {
      return error;
    }
    if (error instanceof HubApiError && [401, 403, 404].includes(error.statusCode)) {
      const text = `the hub has no model ${repository} with revision ${revision}, or HF_TOKEN may not read it`;
      return new ClusterError('not_found', `${text} (status ${error.statusCode})`);
    }
    if (error instanceof Error && 'code' in error && error.code === 'ENOSPC') {
      return new ClusterError('resource_exhausted', `${this.#request.directory}: the disk is full`, {
        cause: error,
      });
    }
    return new ClusterError('unavailable', `the hub did not answer for ${repository}: ${reasonOf(error)}`);
  }
}

/** Not its message: fetch quotes an invalid header or URL, with the token or the password in it. */
function reasonOf(error: unknown): string {
  if (error instanceof HubApiError) {
    return `status ${error.statusCode}`;
  }
  if (!(error instanceof Error)) {
    return 'not an error';
  }
  const text = error.message === 'fetch failed' ? error.message : error.name;
  const { cause } = error;
  return cause instanceof Error && 'code' in cause ? `${text} (${String(cause.code)})` : text;
}
