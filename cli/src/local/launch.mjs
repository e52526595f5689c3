// Runs a script on the Node that the packages bring. Owns: which Node that is, the script's signals and its end.
// Plain JavaScript without dependencies, for Node 18 or later, like its two users: bootstrap.mjs in a checkout,
// mimo.mjs in the npm package.

import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, join } from 'node:path';

const minNodeMajor = 26;
const parentPollMs = 250;
const endingSignals = ['SIGINT', 'SIGTERM', 'SIGHUP'];

const parent = process.ppid;

/**
 * Forwards to a child every signal that ends this process, and ends the child if the npm that started this process is
 * gone: npm forwards only SIGINT and SIGTERM. No portable call reports a parent's death, so this polls the parent's
 * id. Returns a function that undoes it.
 */
export function forwardSignals(child) {
  const forward = (signal) => child.kill(signal);
  for (const signal of endingSignals) {
    process.on(signal, forward);
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
      process.off(signal, forward);
    }
  };
}

/** The Node among the packages of these folders, else the Node that runs this, if it is new enough. */
function findNode(moduleFolders) {
  const packaged = moduleFolders
    .map((modules) => join(modules, '.bin', 'node'))
    .find((path) => existsSync(path));
  if (packaged !== undefined) {
    return packaged;
  }
  if (Number.parseInt(process.versions.node, 10) >= minNodeMajor) {
    return process.execPath;
  }
  throw new Error(
    `needs Node ${minNodeMajor} or later, this is ${process.versions.node}: no package brings Node for ` +
      `${process.platform}-${process.arch}, or npm left it out (--omit=optional)`,
  );
}

/**
 * Runs `[script, ...args]` with this process's terminal, forwards every signal, and ends as the script ends. The
 * folders are those into which npm may have installed Node; the programs of the first come first on the script's PATH.
 */
export function runScript(moduleFolders, args) {
  const node = findNode(moduleFolders);
  const cache =
    process.env.MIMO_CACHE_DIR ??
    join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'mimo-cluster');
  const env = {
    NODE_COMPILE_CACHE: join(cache, 'node-compile-cache'),
    ...process.env,
    PATH: `${join(moduleFolders[0], '.bin')}${delimiter}${process.env.PATH ?? ''}`,
  };
  // The channel is how SCRIPT notices that this process was killed outright; it carries no messages.
  const child = spawn(node, args, { env, stdio: ['inherit', 'inherit', 'inherit', 'ipc'] });
  const stopForwarding = forwardSignals(child);
  child.once('error', (error) => {
    process.stderr.write(`mimo: ${node} cannot be started: ${error.message}\n`);
    process.exitCode = 1;
  });
  child.once('exit', (code, signal) => {
    stopForwarding();
    if (signal === null) {
      process.exitCode = code ?? 1;
    } else {
      process.kill(process.pid, signal);
    }
  });
}
