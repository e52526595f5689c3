// A volume that is easily filled: a small filesystem in memory. The caller that mounts one unmounts it.

import { execFile } from 'node:child_process';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);

export interface SmallVolume {
  readonly path: string;
  /** A file to fill it with. */
  readonly ballast: string;
  readonly unmount: () => Promise<void>;
}

/** Mounts 16 MiB at a path that is not there yet; undefined without the right to. */
export async function mountSmall(path: string): Promise<SmallVolume | undefined> {
  await mkdir(path);
  try {
    await run('mount', ['-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', path]);
  } catch {
    return undefined;
  }
  const unmount = async (): Promise<void> => {
    await run('umount', ['--lazy', path]);
  };
  return { path, ballast: join(path, 'ballast'), unmount };
}
