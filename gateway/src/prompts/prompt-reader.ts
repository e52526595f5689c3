// One process that reads a model's prompts, one at a time, and can be ended at any point. Owns the process and its two
// time limits: the reader's own, and a later kill if it cannot stop itself. Why a process and not a thread:
// docs/explanation/decisions/0018.

import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';

import { ClusterError } from '@mimo/core/process/errors';
import type { TokenTableData } from '@mimo/tokenizer';

import type { ReaderMessage, ReadPromptMessage } from './prompt-messages.ts';

/** A reader's options. */
export interface PromptReaderOptions {
  readonly directory: string;
  /** The time limit of one prompt. */
  readonly timeoutMs: number;
}

/** The time limit of loading; the largest tokenizer files take seconds. */
const loadMaxMs = 60_000;
/**
 * After the time limit a reader has this long to stop itself, then it is killed: a long native call of the JavaScript
 * engine cannot be interrupted.
 */
const killAfterMs = 2_000;
/** Several times what a vocabulary of 151,000 entries and a megabyte of prompt need. */
const heapMaxMegabytes = 512;

/** A running reader. Close it. */
export interface PromptReader {
  readonly tokenTable: TokenTableData;
  /** Resolves once the process is gone. */
  readonly ended: Promise<void>;
  /** Reads one prompt; undefined if the process ended meanwhile. One prompt at a time. */
  read(message: ReadPromptMessage): Promise<ReaderMessage | undefined>;
  close(): Promise<void>;
}

/** Starts a reader; fails as `loadTokenizer` and `parseChatTemplate` do. */
export async function startPromptReader({
  directory,
  timeoutMs,
}: PromptReaderOptions): Promise<PromptReader> {
  const program = new URL(import.meta.resolve('@mimo/gateway/prompts/prompt-reader-process'));
  const child = fork(program, [directory, String(timeoutMs)], {
    serialization: 'advanced',
    execArgv: [`--max-old-space-size=${heapMaxMegabytes}`],
    // It needs no secrets, and its output could quote a prompt.
    env: {},
    stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
  });
  const ended = once(child, 'exit').then(() => undefined);
  const close = async (): Promise<void> => {
    child.ref();
    child.kill('SIGKILL');
    await ended;
  };
  const first = await nextMessage(child, loadMaxMs);
  if (first?.kind !== 'loaded') {
    await close();
    throw first?.kind === 'failed'
      ? new ClusterError(first.code, first.message)
      : new ClusterError('failed_precondition', 'loading the tokenizer crashed its process or took too long');
  }
  child.unref();
  child.channel?.unref();
  return {
    tokenTable: first.tokenTable,
    ended,
    close,
    read: async (message) => {
      child.channel?.ref();
      const reply = nextMessage(child, timeoutMs + killAfterMs);
      child.send(message, () => undefined);
      try {
        return await reply;
      } finally {
        child.channel?.unref();
      }
    },
  };
}

/** The next message; undefined if the process is gone. Kills it after the time limit. */
async function nextMessage(child: ChildProcess, maxMs: number): Promise<ReaderMessage | undefined> {
  const { promise, resolve } = Promise.withResolvers<ReaderMessage | undefined>();
  const onMessage = (message: unknown): void => resolve(message as ReaderMessage);
  const onGone = (): void => resolve(undefined);
  child.once('message', onMessage).once('exit', onGone).once('error', onGone);
  const timer = setTimeout(() => child.kill('SIGKILL'), maxMs);
  if (child.exitCode !== null || child.signalCode !== null) {
    onGone();
  }
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    child.off('message', onMessage).off('exit', onGone).off('error', onGone);
  }
}
