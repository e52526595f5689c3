// The compiling process of the compile benchmark: accepts the flags of `mimo compile`, prints its figures as JSON.

import { compile } from '@mimo/worker/compiler/compile';
import { parseCompileArgs } from '@mimo/worker/compiler/compile-command';

const startedMs = performance.now();
const { signal } = new AbortController();
const { rankBytes } = await compile(parseCompileArgs(process.argv.slice(2)), signal);
const { userCPUTime, systemCPUTime, maxRSS } = process.resourceUsage();
const figures = {
  seconds: Math.round((performance.now() - startedMs) / 100) / 10,
  cpuSeconds: Math.round((userCPUTime + systemCPUTime) / 1e5) / 10,
  peakMemoryBytes: maxRSS * 1_024,
  rankBytes,
};
process.stdout.write(JSON.stringify(figures));
