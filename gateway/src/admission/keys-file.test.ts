import { mkdir, mkdtemp, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { createLog } from '@mimo/core/process/log';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { openKeysFile, type KeysFile } from './keys-file.ts';

const patience = { timeout: 10_000, interval: 50 };

let directory: string;
let path: string;
let lines: string[];
let stop: AbortController;

function keysOf(...keys: string[]): string {
  return JSON.stringify({ keys: keys.map((key) => ({ key, tenant: key })) });
}

async function open(optional = false): Promise<KeysFile> {
  const destination = { write: (line: string) => void lines.push(line) };
  const log = createLog({ process: 'test', level: 'info', destination });
  const file = await openKeysFile({ path, optional, log });
  void file.follow(stop.signal);
  return file;
}

/** The tenant of a key; undefined if the key is refused. */
function tenantOf(file: KeysFile, key: string): string | undefined {
  try {
    return file.authenticate(`Bearer ${key}`).tenant;
  } catch {
    return undefined;
  }
}

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-keys-'));
  path = join(directory, 'keys.json');
  lines = [];
  stop = new AbortController();
});

afterEach(async () => {
  stop.abort();
  await rm(directory, { recursive: true });
});

describe('openKeysFile', () => {
  it('accepts an added key, and refuses a revoked one', async () => {
    await writeFile(path, keysOf('key-of-a'));
    const file = await open();
    expect(tenantOf(file, 'key-of-a')).toBe('key-of-a');
    await writeFile(path, keysOf('key-of-b'));
    await vi.waitFor(() => expect(tenantOf(file, 'key-of-b')).toBe('key-of-b'), patience);
    expect(tenantOf(file, 'key-of-a')).toBeUndefined();
  });

  it('detects swapped links of a mounted Secret', async () => {
    for (const [version, key] of [
      ['..1', 'key-of-a'],
      ['..2', 'key-of-b'],
    ] as const) {
      await mkdir(join(directory, version));
      await writeFile(join(directory, version, 'keys.json'), keysOf(key));
    }
    await symlink('..1', join(directory, '..data'));
    await symlink('..data/keys.json', path);
    const file = await open();
    expect(tenantOf(file, 'key-of-a')).toBe('key-of-a');
    await symlink('..2', join(directory, '..data_tmp'));
    await rename(join(directory, '..data_tmp'), join(directory, '..data'));
    await vi.waitFor(() => expect(tenantOf(file, 'key-of-b')).toBe('key-of-b'), patience);
  });

  it('keeps the last valid keys while the file is invalid or gone, logs it, and loads the next valid one', async () => {
    await writeFile(path, keysOf('key-of-a'));
    const file = await open();
    await writeFile(path, '{"keys":[{"key":"a-secret-key"}]}');
    await vi.waitFor(() => expect(lines.join('')).toContain('invalid keys file'), patience);
    expect(tenantOf(file, 'key-of-a')).toBe('key-of-a');
    await rm(path);
    await vi.waitFor(() => expect(lines.join('')).toContain('is not readable JSON'), patience);
    expect(tenantOf(file, 'key-of-a')).toBe('key-of-a');
    await writeFile(path, keysOf('key-of-b'));
    await vi.waitFor(() => expect(tenantOf(file, 'key-of-b')).toBe('key-of-b'), patience);
    expect(lines.join('')).not.toContain('a-secret-key');
  });

  it('refuses every caller when the list is empty', async () => {
    await writeFile(path, '{"keys":[]}');
    expect(tenantOf(await open(), 'key-of-a')).toBeUndefined();
  });

  it('needs the file at the start unless it is optional, and then rejects every caller until it exists', async () => {
    await expect(open()).rejects.toMatchObject({ code: 'invalid_argument' });
    const file = await open(true);
    expect(tenantOf(file, 'key-of-a')).toBeUndefined();
    await writeFile(path, keysOf('key-of-a'));
    await vi.waitFor(() => expect(tenantOf(file, 'key-of-a')).toBe('key-of-a'), patience);
  });
});
