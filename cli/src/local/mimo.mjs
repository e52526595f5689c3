#!/usr/bin/env node
// The `mimo` command of the npm package. Plain JavaScript for Node 18 or later: the package brings the Node that the
// command itself needs, and npm puts it into the package's own node_modules or, where it hoists, beside the package.

import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

import { runScript } from './launch.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');
try {
  runScript(
    [join(root, 'node_modules'), dirname(root)],
    [join(root, 'cli/src/main.js'), ...process.argv.slice(2)],
  );
} catch (error) {
  process.stderr.write(`mimo: ${error.message}\n`);
  process.exitCode = 1;
}
