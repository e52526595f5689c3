import { cp, mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { identityOf, type IdentityConfig } from './identity.ts';
import { compile } from './compiler/compile.ts';
import { readSafetensorsHeader } from './compiler/safetensors.ts';

const demo = join(import.meta.dirname, '../../models/mimo-demo');
const { signal } = new AbortController();

let directory: string;
let checkpoint: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-identity-'));
  checkpoint = join(directory, 'checkpoint');
  await cp(demo, checkpoint, { recursive: true });
});
afterEach(() => rm(directory, { recursive: true, force: true }));

function of(fields: Partial<IdentityConfig>): Promise<string> {
  return identityOf({ checkpointDirectory: '', shardDirectory: '', precision: 'int8', ...fields }, signal);
}

async function change(file: string, from: string, to: string): Promise<void> {
  const path = join(checkpoint, file);
  const text = await readFile(path, 'utf8').catch(() => from);
  expect(text).toContain(from);
  await writeFile(path, text.replace(from, to));
}

describe('identityOf', () => {
  it('is the same for equal content in any directory', async () => {
    const identity = await of({ checkpointDirectory: checkpoint });
    expect(identity).toMatch(/^[0-9a-f]{16}\.[0-9a-f]{16}$/);
    expect(await of({ checkpointDirectory: demo })).toBe(identity);
    // Settings that no text depends on.
    await writeFile(join(checkpoint, 'README.md'), 'words');
    expect(await of({ checkpointDirectory: checkpoint })).toBe(identity);
  });

  it.each([
    ['config.json', '"rope_theta"', '"rope_theta_of_old"', 'both'],
    ['generation_config.json', '{', '{"note": 1, ', 'text'],
    ['tokenizer_config.json', '{', '{"note": 1, ', 'text'],
    ['tokenizer.json', '{', '{"note": 1, ', 'text'],
    ['chat_template.jinja', 'a', 'b', 'text'],
    ['merges.txt', '#', '# ', 'text'],
    ['vocab.json', '{', '{"note": 700, ', 'text'],
  ])('changes with %s', async (file, from, to, half) => {
    const [text, weights] = (await of({ checkpointDirectory: checkpoint })).split('.');
    await change(file, from, to);
    const after = (await of({ checkpointDirectory: checkpoint })).split('.');
    expect([after[0] === text, after[1] === weights]).toEqual([false, half === 'text']);
  });

  it('changes with a single weight, and with the precision, and not with the text’s half then', async () => {
    const before = await of({ checkpointDirectory: checkpoint });
    const precise = await of({ checkpointDirectory: checkpoint, precision: 'fp32' });
    const path = join(checkpoint, 'model.safetensors');
    const [{ offset } = { offset: 0 }] = await readSafetensorsHeader(path);
    const file = await open(path, 'r+');
    await file.write(Buffer.from([1, 60]), 0, 2, offset);
    await file.close();
    const after = await of({ checkpointDirectory: checkpoint });
    expect(new Set([before, precise, after]).size).toBe(3);
    expect(new Set([before, precise, after].map((identity) => identity.split('.')[0])).size).toBe(1);
  });

  it('of compiled shards is their key, without the tokenizer', async () => {
    const outDirectory = join(directory, 'shards');
    const options = { modelDirectory: checkpoint, outDirectory, tensorParallel: 1 } as const;
    await compile({ ...options, precision: 'int8' }, signal);
    const identity = await of({ shardDirectory: outDirectory });
    expect(identity).toMatch(/^\.[0-9a-f]{16}$/);
    await compile({ ...options, precision: 'int4' }, signal);
    expect(await of({ shardDirectory: outDirectory })).not.toBe(identity);
  });
});
