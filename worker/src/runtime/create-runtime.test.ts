import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import * as path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createRuntime } from './create-runtime.ts';
import type { RuntimeOptions } from './runtime.ts';

const directory = mkdtempSync(path.join(tmpdir(), 'mimo-runtime-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

const options: RuntimeOptions = { implementation: 'ort-capi', executionProvider: 'cpu', intraOpThreads: 1 };

describe('createRuntime', () => {
  it.each<[string, Partial<Record<keyof RuntimeOptions, unknown>>, RegExp]>([
    [
      'another execution provider',
      { executionProvider: 'tpu' },
      /executionProvider: must be one of cpu, cuda/,
    ],
    [
      'a device without the C API',
      { executionProvider: 'cuda', implementation: 'ort-node' },
      /executionProvider: cuda needs runtime ort-capi, is ort-node/,
    ],
    ['no threads', { intraOpThreads: 0 }, /intraOpThreads: must be at least 1, is 0/],
  ])('refuses %s', async (_, wrong, message) => {
    await expect(createRuntime({ ...options, ...wrong } as RuntimeOptions)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(message),
    });
  });

  it('names the libraries that CUDA lacks', async () => {
    const libraryPath = path.join(directory, 'libonnxruntime.so.1.30.0');
    await expect(createRuntime({ ...options, executionProvider: 'cuda', libraryPath })).rejects.toMatchObject(
      {
        code: 'failed_precondition',
        message: expect.stringMatching(
          /needs .*libonnxruntime\.so\.1\.30\.0, .*libonnxruntime_providers_cuda\.so/,
        ),
      },
    );
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

  it('names the segment whose file is missing or not a graph', async () => {
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
