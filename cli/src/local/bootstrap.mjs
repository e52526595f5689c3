// Runs one of the repository's TypeScript files on a bare checkout: `node cli/src/local/bootstrap.mjs SCRIPT [args]`.
// Owns: that the packages of package-lock.json are installed; launch.mjs then runs SCRIPT.
// Plain JavaScript without dependencies, for Node 18 or later, because it runs before anything is installed.
// Deliberately independent of any registry and of what SCRIPT does.

import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir, userInfo } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import { forwardSignals, runScript } from './launch.mjs';

const lockPollMs = 200;
/** A lock without an owner's id belongs to a process that died between two system calls, which never take this long. */
const ownerlessLockMs = 5_000;

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');
const modules = join(root, 'node_modules');

function readJson(path) {
  try {
    return JSON.parse(readFileSync(path, 'utf8'));
  } catch {
    return undefined;
  }
}

/**
 * Whether node_modules matches package-lock.json. npm writes node_modules/.package-lock.json as the last
 * act of an install and removes it as the first act of the next, so an interrupted install never looks complete.
 * Optional packages are skipped: those of other platforms are absent on purpose.
 */
function isInstalled() {
  const wanted = readJson(join(root, 'package-lock.json'))?.packages ?? {};
  const present = readJson(join(modules, '.package-lock.json'))?.packages;
  return (
    present !== undefined &&
    Object.entries(wanted).every(
      ([path, entry]) =>
        !path.startsWith('node_modules/') ||
        entry.optional === true ||
        (present[path]?.version === entry.version && present[path]?.integrity === entry.integrity),
    )
  );
}

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
}

/** Holds a lock, one for each checkout and user, while `action` runs. A lock whose owner has died is taken over. */
async function withLock(action) {
  const id = createHash('sha256').update(root).digest('hex').slice(0, 16);
  const lock = join(tmpdir(), `mimo-install-${userInfo().uid}-${id}.lock`);
  for (;;) {
    try {
      mkdirSync(lock);
      break;
    } catch (error) {
      if (error.code !== 'EEXIST') {
        throw error;
      }
    }
    const owner = Number(readJson(join(lock, 'pid')));
    const ageMs = Date.now() - (statSync(lock, { throwIfNoEntry: false })?.mtimeMs ?? Date.now());
    if (Number.isInteger(owner) ? !isAlive(owner) : ageMs > ownerlessLockMs) {
      rmSync(lock, { recursive: true, force: true });
    } else {
      await sleep(lockPollMs);
    }
  }
  try {
    writeFileSync(join(lock, 'pid'), String(process.pid));
    return await action();
  } finally {
    rmSync(lock, { recursive: true, force: true });
  }
}

/** Runs `npm ci`; its output is shown only if it fails, since it is long and npm warns about this very Node. */
async function install() {
  const begin = Date.now();
  process.stderr.write(
    'mimo: installing the packages of package-lock.json (npm ci), about half a minute ...\n',
  );
  const npm = process.env.npm_execpath;
  const [program, args] =
    npm !== undefined && basename(npm).startsWith('npm') ? [process.execPath, [npm, 'ci']] : ['npm', ['ci']];
  const child = spawn(program, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] });
  const stopForwarding = forwardSignals(child);
  const output = [];
  child.stdout.on('data', (chunk) => output.push(chunk));
  child.stderr.on('data', (chunk) => output.push(chunk));
  const code = await new Promise((settle) => {
    child.once('error', (error) => {
      output.push(
        Buffer.from(
          `${error.message}\nnpm was not found: install it together with Node, or put it on the PATH\n`,
        ),
      );
      settle(1);
    });
    child.once('close', (exitCode) => settle(exitCode ?? 1));
  });
  stopForwarding();
  if (code !== 0) {
    process.stderr.write(Buffer.concat(output));
    throw new Error(`npm ci failed with exit code ${code}`);
  }
  process.stderr.write(`mimo: installed in ${((Date.now() - begin) / 1000).toFixed(0)} s\n`);
}

const [script, ...args] = process.argv.slice(2);
if (script === undefined) {
  process.stderr.write('usage: node cli/src/local/bootstrap.mjs SCRIPT [args]\n');
  process.exitCode = 2;
} else {
  try {
    if (!isInstalled()) {
      await withLock(async () => {
        if (!isInstalled()) {
          await install();
        }
      });
    }
    runScript([modules], [resolve(root, script), ...args]);
  } catch (error) {
    process.stderr.write(`mimo: ${error.message}\n`);
    process.exitCode = 1;
  }
}
