// Every setting of every process: variable, default and meaning, from the tables in each config.ts. The meaning is the
// comment above the setting, so that it is written once, where the default is.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import type { Settings } from '@mimo/core/process/config';
import { controllerSettings } from '@mimo/controller/config';
import { gatewaySettings } from '@mimo/gateway/config';
import { workerSettings } from '@mimo/worker/config';

import { code, pageOf, tableOf } from './markdown.ts';

const processes: readonly (readonly [string, string, Settings])[] = [
  ['Gateway', 'gateway/src/config.ts', gatewaySettings],
  ['Worker', 'worker/src/config.ts', workerSettings],
  ['Controller', 'controller/src/config.ts', controllerSettings],
];

/** The page of settings. */
export function settingsPage(root: string): string {
  const parts = processes.map(([title, file, settings]) => {
    const comments = commentsOf(readFileSync(join(root, file), 'utf8'));
    const rows = Object.entries(settings).map(([key, { variable, fallback }]) => [
      code(variable),
      fallback === undefined ? 'required' : code(fallback),
      comments.get(key) ?? '',
    ]);
    return `## ${title}\n\n${tableOf(['variable', 'default', 'meaning'], rows)}`;
  });
  const forms =
    'Durations are written as `250ms`, `30s`, `5m` or `24h`, sizes as `512Mi` or `16Gi`, lists with commas. ' +
    'A process lists every problem of its settings in one error and exits.';
  return pageOf({ title: 'Settings', source: 'the config.ts of each process', parts: [forms, ...parts] });
}

/** The comment above each key of a table of settings; keys that share a comment stand below it without a blank line. */
function commentsOf(source: string): ReadonlyMap<string, string> {
  const pattern = /\/\*\*((?:(?!\*\/)[\s\S])*)\*\/\s+(\w+): /g;
  return new Map(
    [...source.matchAll(pattern)].map(([, comment = '', key = '']) => [
      key,
      comment.replaceAll(/\n\s*\* ?/g, ' ').trim(),
    ]),
  );
}
