// Runs one of the repository's TypeScript files on a bare checkout: `node cli/src/local/bootstrap.mjs SCRIPT [args]`.
// Owns: that the packages of package-lock.json are installed, and that SCRIPT runs on the Node which they bring.
// Plain JavaScript without dependencies, for Node 18 or later, because it runs before anything is installed.
// Deliberately independent of any registry and of what SCRIPT does.

import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { homedir, tmpdir, userInfo } from 'node:os';
import { basename, delimiter, dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const minNodeMajor = 26;
const lockPollMs = 200;
const parentPollMs = 250;
const endingSignals = ['SIGINT', 'SIGTERM', 'SIGHUP'];
/** A lock without an owner's id belongs to a process that died between two system calls, which never take this long. */
const ownerlessLockMs = 5_000;

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');
const modules = join(root, 'node_modules');
const parent = process.ppid;

function readJson(path) {
  try {
    return JSON.parse(readFileSync(path, 'utf8'));
  } catch {
    return undefined;
  }
}

/**
 * Whether node_modules holds what package-lock.json asks for. npm writes node_modules/.package-lock.json as the last
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

/**
 * Forwards to a child every signal that ends this process, and ends the child if the npm that started this process is
 * gone: npm forwards only SIGINT and SIGTERM. No portable call reports a parent's death, so this polls the parent's
 * id. Returns a function that undoes it.
 */
function handOnTo(child) {
  const handOn = (signal) => child.kill(signal);
  for (const signal of endingSignals) {
    process.on(signal, handOn);
  }
  const watch = setInterval(() => {
    if (process.env.npm_execpath !== undefined && process.ppid !== parent) {
      clearInterval(watch);
      child.kill('SIGTERM');
    }
  }, parentPollMs).unref();
  return () => {
    clearInterval(watch);
    for (const signal of endingSignals) {
      process.off(signal, handOn);
    }
  };
}

/** Runs `npm ci`. Shows its output only if it fails: it is long, and npm warns about this version of Node. */
async function install() {
  const begin = Date.now();
  process.stderr.write(
    'mimo: installing the packages of package-lock.json (npm ci), about half a minute ...\n',
  );
  const npm = process.env.npm_execpath;
  const [program, args] =
    npm !== undefined && basename(npm).startsWith('npm') ? [process.execPath, [npm, 'ci']] : ['npm', ['ci']];
  const child = spawn(program, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] });
  const letGo = handOnTo(child);
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
  letGo();
  if (code !== 0) {
    process.stderr.write(Buffer.concat(output));
    throw new Error(`npm ci failed with exit code ${code}`);
  }
  process.stderr.write(`mimo: installed in ${((Date.now() - begin) / 1000).toFixed(0)} s\n`);
}

/** The Node that runs SCRIPT: the one from the packages, else this one if it is new enough. */
function findNode() {
  const packaged = join(modules, '.bin', 'node');
  if (existsSync(packaged)) {
    return packaged;
  }
  if (Number.parseInt(process.versions.node, 10) >= minNodeMajor) {
    return process.execPath;
  }
  throw new Error(
    `needs Node ${minNodeMajor} or later, this is ${process.versions.node}: no package contains Node for  ` +
      `${process.platform}-${process.arch}, or it was left out (npm ci --omit=optional)`,
  );
}

/** Runs SCRIPT on this process's terminal, forwards every signal, and exits with its exit code. */
function runScript(node, args) {
  const cache =
    process.env.MIMO_CACHE_DIR ??
    join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'mimo-cluster');
  const env = {
    NODE_COMPILE_CACHE: join(cache, 'node-compile-cache'),
    ...process.env,
    PATH: `${join(modules, '.bin')}${delimiter}${process.env.PATH ?? ''}`,
  };
  // The channel is how SCRIPT notices that this process was killed outright; it carries no messages.
  const child = spawn(node, args, { env, stdio: ['inherit', 'inherit', 'inherit', 'ipc'] });
  const letGo = handOnTo(child);
  child.once('error', (error) => {
    process.stderr.write(`mimo: ${node} cannot be started: ${error.message}\n`);
    process.exitCode = 1;
  });
  child.once('exit', (code, signal) => {
    letGo();
    if (signal === null) {
      process.exitCode = code ?? 1;
    } else {
      process.kill(process.pid, signal);
    }
  });
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
    runScript(findNode(), [resolve(root, script), ...args]);
  } catch (error) {
    process.stderr.write(`mimo: ${error.message}\n`);
    process.exitCode = 1;
  }
}
