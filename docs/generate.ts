// docs/reference from its sources: settings, metrics, error codes, commands, resources, the API. `node
// docs/generate.ts` writes the pages; a test compares what is committed. With a directory as its argument it writes
// there instead.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { apiPage } from './generate/api.ts';
import { cliPage } from './generate/cli.ts';
import { errorsPage } from './generate/errors.ts';
import { metricsPage } from './generate/metrics.ts';
import { resourcesPage } from './generate/resources.ts';
import { settingsPage } from './generate/settings.ts';

const root = join(import.meta.dirname, '..');
const [output = join(root, 'docs/reference')] = process.argv.slice(2);
const pages = {
  'api.md': apiPage(root),
  'cli.md': cliPage(root),
  'errors.md': errorsPage(),
  'metrics.md': metricsPage(root),
  'resources.md': resourcesPage(),
  'settings.md': settingsPage(root),
};
mkdirSync(output, { recursive: true });
for (const [file, text] of Object.entries(pages)) {
  writeFileSync(join(output, file), text);
}
