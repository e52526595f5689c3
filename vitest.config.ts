// The layers of `npm test`, fastest first. `servers` and `kubernetes` start real processes, so their files run one after
// another.

import { defineConfig } from 'vitest/config';

/** Builds and fetches what the layer needs, outside any time limit. */
const globalSetup = ['tests/harness/set-up.ts'];

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
        },
      },
      {
        test: {
          name: 'golden',
          include: ['tests/golden/**/*.test.ts'],
          testTimeout: 120_000,
          hookTimeout: 120_000,
        },
      },
      {
        test: {
          name: 'webgpu',
          include: ['tests/webgpu/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          testTimeout: 180_000,
          hookTimeout: 180_000,
        },
      },
      {
        test: {
          name: 'servers',
          include: ['tests/{harness,cluster,faults}/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          // Only what hangs is to be ended: the storms of thousands take minutes beside forty busy processes.
          testTimeout: 600_000,
          hookTimeout: 600_000,
        },
      },
      {
        test: {
          name: 'hostile',
          include: ['tests/hostile/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          testTimeout: 120_000,
          hookTimeout: 180_000,
        },
      },
      {
        test: {
          name: 'kubernetes',
          include: ['tests/kubernetes/**/*.test.ts'],
          globalSetup,
          fileParallelism: false,
          testTimeout: 300_000,
          hookTimeout: 300_000,
        },
      },
    ],
  },
});
