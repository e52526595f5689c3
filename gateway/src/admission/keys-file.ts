// The API keys file while the gateway runs: it is read again when it changes, so that keys are added and revoked
// without a restart. Owns the polling; the file's content belongs to auth.ts.

import { stat } from 'node:fs/promises';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { loadKeys, parseKeys, type Authenticate } from './auth.ts';

/** The keys of a file, as they are at this moment. */
export interface KeysFile {
  readonly authenticate: Authenticate;
  /**
   * Reads the file again whenever it changes, until the signal fires. A file that is wrong or gone leaves the last
   * good keys.
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
 * By looking and not by notification: a mounted Secret is changed by swapping a link to its directory, behind the
 * path.
 */
const lookMs = 1_000;

/** Reads the file for the first time; fails as `loadKeys` does. */
export async function openKeysFile({ path, optional, log }: KeysFileOptions): Promise<KeysFile> {
  // Looked at before it is read: a change in between is seen by the next look.
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
