// Watches the API keys file and reads it again when it changes, so that keys are added and revoked without a restart.
// Owns the polling; auth.ts owns the file's format.

import { stat } from 'node:fs/promises';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { loadKeys, parseKeys, type Authenticate } from './auth.ts';

/** The current keys of a file. */
export interface KeysFile {
  readonly authenticate: Authenticate;
  /**
   * Reads the file again whenever it changes, until the signal fires. While the file is invalid or missing, the last
   * valid keys stay in force.
   */
  follow(signal: AbortSignal): Promise<void>;
}

export interface KeysFileOptions {
  readonly path: string;
  /** True: without a file, every caller is rejected. False: the file must exist at the start. */
  readonly optional: boolean;
  readonly log: Log;
}

/**
 * The file is polled, because notifications miss a change of a mounted Secret: it swaps a link to the directory on the
 * path.
 */
const lookMs = 1_000;

/** Reads the file for the first time; fails as `loadKeys` does. */
export async function openKeysFile({ path, optional, log }: KeysFileOptions): Promise<KeysFile> {
  // Identified before it is read: the next poll detects a change in between.
  let seen = await identify(path);
  let current: Authenticate;
  if (seen === undefined && optional) {
    log.warn({ path }, 'no keys file yet: all callers are rejected');
    current = parseKeys({ keys: [] }, path);
  } else {
    current = await loadKeys(path);
  }
  const look = async (): Promise<void> => {
    const found = await identify(path);
    if (found === seen) {
      return;
    }
    seen = found;
    try {
      current = await loadKeys(path);
      log.info({ path }, 'reloaded the keys file');
    } catch (error) {
      log.error({ error: ClusterError.from(error), path }, 'invalid keys file: keeping the last valid keys');
    }
  };
  return {
    authenticate: (authorization) => current(authorization),
    follow: async (signal) => {
      while (!signal.aborted) {
        await pause(lookMs, signal);
        await look();
      }
    },
  };
}

/** A fingerprint of the file's state; undefined without a file. */
async function identify(path: string): Promise<string | undefined> {
  return stat(path).then(
    ({ dev, ino, size, mtimeMs, ctimeMs }) => [dev, ino, size, mtimeMs, ctimeMs].join(),
    () => undefined,
  );
}
