// The layers of `npm test`, fastest first. In `servers` and `kubernetes` most of the time is spent waiting for real
// processes, so several files run beside one another, even on two cores: each has its own directories and ports.

import { defineConfig } from 'vitest/config';

/** Builds and fetches what the layer needs, outside any time limit. */
const globalSetup = ['tests/harness/set-up.ts'];

/** Only what hangs is to be ended: on a machine with forty busy processes, what takes seconds takes minutes. */
const limits = { testTimeout: 600_000, hookTimeout: 600_000 };

/** Each property lasts for seconds, whatever the machine: too long for every change. */
const fuzzing = '*/src/**/fuzz.test.ts';

export default defineConfig({
  test: {
    coverage: { provider: 'v8', include: ['*/src/**/*.ts'] },
    projects: [
      {
        test: {
          name: 'unit',
          // Far above what a test takes: a busy machine is no failure.
          testTimeout: 60_000,
          hookTimeout: 60_000,
          include: ['*/src/**/*.test.ts', 'deploy/**/*.test.ts', 'tests/structure/**/*.test.ts'],
          exclude: [fuzzing],
          // Vitest leaves one core idle by itself, which on two cores is half of them.
          maxWorkers: '100%',
          sequence: { groupOrder: 3 },
        },
      },
      {
        test: {
          name: 'fuzz',
          include: [fuzzing],
          ...limits,
        },
      },
      {
        test: {
          name: 'golden',
          include: ['tests/golden/**/*.test.ts'],
          ...limits,
        },
      },
      {
        test: {
          name: 'webgpu',
          include: ['tests/webgpu/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          ...limits,
        },
      },
      {
        test: {
          name: 'servers',
          include: ['tests/{harness,cluster,faults}/**/*.test.ts'],
          globalSetup,
          maxWorkers: 3,
          sequence: { groupOrder: 1 },
          ...limits,
        },
      },
      {
        test: {
          name: 'hostile',
          include: ['tests/hostile/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          ...limits,
        },
      },
      {
        test: {
          name: 'kubernetes',
          include: ['tests/kubernetes/**/*.test.ts'],
          globalSetup,
          maxWorkers: 2,
          sequence: { groupOrder: 2 },
          ...limits,
        },
      },
    ],
  },
});
