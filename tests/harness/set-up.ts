// Builds and downloads before the first test of a layer, once per machine, with progress on standard error, so that no
// time limit of a test or a hook includes them, however busy the machine is. If something is not available here, the
// tests that need it fail with instructions; all tests of the Kubernetes layer need its programs.

import type { TestProject } from 'vitest/node';

import { cacheDirectoryFrom, findNatsServer } from '../../cli/src/local/nats-server.ts';
import { ensureNodePackages } from './kubernetes/debian-packages.ts';
import { findTools } from './kubernetes/tools.ts';
import { findSoftwareVulkan } from './software-vulkan.ts';

const cacheDirectory = cacheDirectoryFrom(process.env);
const onProgress = (line: string): boolean => process.stderr.write(`mimo: ${line}\n`);
const signal = new AbortController().signal;

const findNats = (): Promise<unknown> => findNatsServer({ cacheDirectory, onProgress, signal });
const orNothing = (finding: Promise<unknown>): Promise<unknown> => finding.catch(() => undefined);

/** By layer; one step after another, as each of them takes all processors. */
const steps: Readonly<Record<string, readonly (() => Promise<unknown>)[]>> = {
  webgpu: [() => orNothing(findSoftwareVulkan(cacheDirectory))],
  servers: [findNats],
  hostile: [findNats],
  kubernetes: [findTools, findNats, () => orNothing(ensureNodePackages(onProgress))],
};

export default async function setUp({ name }: TestProject): Promise<void> {
  for (const step of steps[name] ?? []) {
    await step();
  }
}
