// Wall clocks differ between machines and are set while processes run. So no decision depends on one: processes
// exchange time left, and each uses performance.now(). These are the places that may read a wall clock.

import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');

/** File -> why it needs the wall clock, and how often it reads it. */
const allowed: Readonly<Record<string, number>> = {
  // grpc-js takes a point in time and converts it back to the time left.
  'core/src/grpc/client.ts': 1,
  // The time of a file, of which only the changing counts.
  'core/src/process/file-lock.ts': 1,
  // Until the API server has told its time.
  'controller/src/kube/api-clock.ts': 1,
  // One machine's clock with itself: the age of a lock file, and how long an installation took.
  'cli/src/local/bootstrap.mjs': 4,
};

const readings = /\bDate\.now\b|\bnew Date\(\)|\bperformance\.timeOrigin\b/g;

it('processes read the wall clock only in the listed places', () => {
  const sources = globSync('{cli,controller,core,deploy,gateway,proto,tokenizer,worker}/**/*.{ts,mjs}', {
    cwd: root,
    exclude: (name) => name === 'node_modules' || name === 'gen' || name.endsWith('.test.ts'),
  });
  expect(sources.length).toBeGreaterThan(150);
  const found = sources.flatMap((file) => {
    const count = readFileSync(join(root, file), 'utf8').match(readings)?.length ?? 0;
    return count === 0 ? [] : [[file, count] as const];
  });
  expect(Object.fromEntries(found)).toEqual(allowed);
});
