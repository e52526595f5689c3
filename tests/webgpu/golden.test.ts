// The engine on a WebGPU device, a software one unless VK_DRIVER_FILES names another, against the oracle: weights,
// keys, values and activations stay in the device's buffers, partial sums and logits cross.

import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, it } from 'vitest';
import { cacheDirectoryFrom } from '../../cli/src/local/nats-server.ts';
import { findSoftwareVulkan, type VulkanEnvironment } from '../harness/software-vulkan.ts';

/** Weights, activations, keys and values of 11 bits, and this provider's products add up in them too. */
const tolerance = 3e-2;

let vulkan: VulkanEnvironment;
beforeAll(async () => {
  vulkan = await findSoftwareVulkan(cacheDirectoryFrom(process.env));
});

async function runGolden(args: readonly string[], env: NodeJS.ProcessEnv): Promise<Record<string, unknown>> {
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [fileURLToPath(new URL('golden-process.ts', import.meta.url)), ...args],
    { env: { ...process.env, ...env } },
  );
  return JSON.parse(stdout) as Record<string, unknown>;
}

describe('the engine on WebGPU', () => {
  it.each([
    ['one-to-one', 1],
    ['two-to-one-sharded', 2],
  ] as const)(
    'gives the logits of the oracle for %s over %i ranks: whole, chunked, one by one, beside another prompt',
    async (name, ranks) => {
      const { errors } = await runGolden([name, String(ranks)], { ...vulkan });
      expect(errors).toHaveLength(3);
      for (const { backbone, mtp } of errors as { backbone: number; mtp: number }[]) {
        expect(backbone).toBeLessThan(tolerance);
        expect(mtp).toBeLessThan(tolerance);
      }
    },
  );

  it('says that it needs a device where there is none', async () => {
    const nothing = await runGolden(['one-to-one', '1'], { ...vulkan, VK_DRIVER_FILES: '/dev/null' });
    expect(nothing).toEqual({
      code: 'failed_precondition',
      message: expect.stringMatching(/^executionProvider webgpu: no device: needs a driver/),
    });
  });
});
