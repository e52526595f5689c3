// A process that runs a golden fixture on the WebGPU provider and prints its errors as one JSON line: the device is
// found through variables that a process must be started with.

import { ClusterError } from '@mimo/core/process/errors';
import { CompiledFixtures, readExpectedIds, readExpectedMatrix, relativeError } from '../golden/fixture.ts';
import type { FixtureName } from '../golden/fixture.ts';
import { openLocalGroup, promptLogits } from '../harness/local-group.ts';
import { openProcessGroup } from '../harness/process-group.ts';

const [name, ranks] = process.argv.slice(2) as [FixtureName, string];
const fixtures = new CompiledFixtures();
try {
  const directories = await fixtures.compile(name, { precision: 'fp16', tensorParallel: Number(ranks) });
  const device = { executionProvider: 'webgpu' } as const;
  const size = { maxRows: 128, maxHeadRows: 128, kvBlocks: 8 };
  const group =
    directories.length === 1
      ? await openLocalGroup({ directories, implementation: 'ort-capi', device, ...size })
      : await openProcessGroup({ directories, device, ...size });
  const { promptIds } = readExpectedIds(name);
  const errors = [promptIds.length, 7, 1].map((chunkTokens) => {
    const [, second] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
    return {
      chunkTokens,
      backbone: relativeError(second!.backbone, readExpectedMatrix(name, 'logits')),
      mtp: relativeError(second!.mtp, readExpectedMatrix(name, 'mtp_logits')),
    };
  });
  await group.close();
  process.stdout.write(`${JSON.stringify({ errors })}\n`);
} catch (error) {
  const { code, message } = ClusterError.from(error);
  process.stdout.write(`${JSON.stringify({ code, message })}\n`);
} finally {
  fixtures.remove();
}
