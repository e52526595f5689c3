// The API keys file while the gateway runs: it is read again when it changes, so that keys are added and revoked without a
// restart. Owns the looking; what is in the file is auth.ts's business.

import { stat } from 'node:fs/promises';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { loadKeys, parseKeys, type Authenticate } from './auth.ts';

/** The keys of a file, as they are at this moment. */
export interface KeysFile {
  readonly authenticate: Authenticate;
  /** Reads the file again whenever it changes, until the signal fires. A file that is wrong or gone leaves the last good keys. */
  follow(signal: AbortSignal): Promise<void>;
}

export interface KeysFileOptions {
  readonly path: string;
  /** True: while there is no file, nobody is let in. False: there must be one at the start. */
  readonly optional: boolean;
  readonly log: Log;
}

/** By looking and not by notification: a mounted Secret is changed by swapping a link to its directory, behind the path. */
const lookMs = 1_000;

/** Reads the file for the first time; fails as `loadKeys` does. */
export async function openKeysFile({ path, optional, log }: KeysFileOptions): Promise<KeysFile> {
  // Looked at before it is read: a change in between is seen by the next look.
  let seen = await identify(path);
  let current: Authenticate;
  if (seen === undefined && optional) {
    log.warn({ path }, 'no keys file yet: nobody is let in');
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
      log.info({ path }, 'keys file read again');
    } catch (error) {
      log.error({ error: ClusterError.from(error), path }, 'keys file not usable: the last good keys stay');
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

/** What tells one state of the file from another; undefined where there is none. */
async function identify(path: string): Promise<string | undefined> {
  return stat(path).then(
    ({ dev, ino, size, mtimeMs, ctimeMs }) => [dev, ino, size, mtimeMs, ctimeMs].join(),
    () => undefined,
  );
}
