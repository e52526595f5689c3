import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import * as path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createRuntime, type RuntimeOptions } from './runtime.ts';

const directory = mkdtempSync(path.join(tmpdir(), 'mimo-runtime-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

const options: RuntimeOptions = { implementation: 'ort-capi', executionProvider: 'cpu', intraOpThreads: 1 };

describe('createRuntime', () => {
  it.each<[string, Partial<Record<keyof RuntimeOptions, unknown>>, RegExp]>([
    ['another execution provider', { executionProvider: 'cuda' }, /executionProvider: must be cpu, is cuda/],
    ['no threads', { intraOpThreads: 0 }, /intraOpThreads: must be at least 1, is 0/],
  ])('refuses %s', async (_, wrong, message) => {
    await expect(createRuntime({ ...options, ...wrong } as RuntimeOptions)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(message),
    });
  });

  it('can be closed and created again, with another number of threads', async () => {
    for (const intraOpThreads of [1, 2, 1]) {
      const runtime = await createRuntime({ ...options, intraOpThreads });
      const tensor = runtime.tensor(new Float32Array(new SharedArrayBuffer(16)), [2, 2]);
      tensor.release();
      expect(() => tensor.release()).not.toThrow();
      runtime.close();
      expect(() => runtime.close()).not.toThrow();
    }
  });

  it('names the segment whose file is missing or no graph', async () => {
    const runtime = await createRuntime(options);
    const source = {
      name: 'layer.0.qkv',
      path: path.join(directory, 'absent.onnx'),
      inputs: [],
      outputs: [],
    };
    expect(() => runtime.loadSegment(source)).toThrow(/segment layer\.0\.qkv: .*absent\.onnx/);
    const garbage = path.join(directory, 'garbage.onnx');
    writeFileSync(garbage, 'not a graph');
    expect(() => runtime.loadSegment({ ...source, path: garbage })).toThrow(/segment layer\.0\.qkv: /);
    runtime.close();
  });
});
