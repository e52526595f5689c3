// `npm run docs`: builds the documentation as a site into docs/site/.vitepress/dist. The generator is installed here on
// first use, from docs/site/package-lock.json: it weighs 100 MB, which nobody needs who only runs the cluster.

import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

const here = import.meta.dirname;

function packagesOf(
  lockFile: string,
): Readonly<Record<string, { readonly version: string; readonly optional?: boolean }>> {
  const path = join(here, lockFile);
  return existsSync(path)
    ? (JSON.parse(readFileSync(path, 'utf8')) as { packages: ReturnType<typeof packagesOf> }).packages
    : {};
}

/** npm writes its own lock file as the last act of an install, without the packages of other platforms. */
function isInstalled(): boolean {
  const present = packagesOf('node_modules/.package-lock.json');
  return Object.entries(packagesOf('package-lock.json')).every(
    ([path, { version, optional }]) => path === '' || optional === true || present[path]?.version === version,
  );
}

if (!isInstalled()) {
  const npm = process.env['npm_execpath'];
  const [program, ...args] = npm === undefined ? ['npm', 'ci'] : [process.execPath, npm, 'ci'];
  execFileSync(program, args, { cwd: here, stdio: 'inherit' });
}
// `vitepress dev` instead of `build`: `npm run docs -- dev`.
const [command = 'build', ...options] = process.argv.slice(2);
execFileSync(process.execPath, ['node_modules/vitepress/bin/vitepress.js', command, ...options], {
  cwd: here,
  stdio: 'inherit',
});
