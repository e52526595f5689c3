// The log of a process: one JSON object a line. A message is constant, variable parts are fields (`requestId`,
// `tenant`, `model`, `group`, `rank`, `revision`). Prompts and completions are never logged. Errors are written by
// our own rules, since libraries attach requests, headers and URLs to theirs. A repeated message is written a few
// times and then counted, so that no client can fill a disk.

import { pino, type DestinationStream, type LogFn, type Logger } from 'pino';

import { placesOf, textOf } from './errors.ts';

export type Log = Logger;

export const logLevels = ['debug', 'info', 'warn', 'error', 'silent'] as const;

export type LogLevel = (typeof logLevels)[number];

/** What a process log needs: the process name is a field of every line. */
export interface LogOptions {
  readonly process: string;
  readonly level: LogLevel;
  /** Default: standard output. */
  readonly destination?: DestinationStream;
}

/**
 * Lines of one message and level in one window: more than a start of many groups writes, far fewer than fill a disk.
 */
const repeatWindowMs = 10_000;
const repeatedLines = 100;
/** Length of one text in an error. */
const maxTextCharacters = 2_000;
const maxCauses = 5;

/**
 * Makes the log of a process. Errors go in the field `error`, with their code, stack and cause. After 100 times in 10
 * s a message is left out; at the end of the window a line with the same message and the count `repeated` follows.
 */
export function createLog(options: LogOptions): Log {
  const repeats = new Map<string, { lines: number; repeated: number }>();
  const settings = {
    level: options.level,
    base: { process: options.process },
    timestamp: pino.stdTimeFunctions.isoTime,
    errorKey: 'error',
    serializers: { error: describeError },
    formatters: { level: (label: string) => ({ level: label }) },
    hooks: {
      logMethod(this: Logger, args: Parameters<LogFn>, method: LogFn, level: number): void {
        const message = args.findLast((arg) => typeof arg === 'string') ?? '';
        const key = `${level} ${message}`;
        const seen = repeats.get(key);
        if (seen === undefined) {
          const begun = { lines: 1, repeated: 0 };
          repeats.set(key, begun);
          const end = (): void => {
            repeats.delete(key);
            if (begun.repeated > 0) {
              method.call(this, { repeated: begun.repeated, windowMs: repeatWindowMs }, message);
            }
          };
          setTimeout(end, repeatWindowMs).unref();
        } else if (seen.lines >= repeatedLines) {
          seen.repeated += 1;
          return;
        } else {
          seen.lines += 1;
        }
        method.apply(this, args);
      },
    },
  };
  return options.destination === undefined ? pino(settings) : pino(settings, options.destination);
}

interface DescribedError {
  readonly type: string;
  readonly code?: string | number;
  readonly message: string;
  /** Without the message, which the first lines of a stack repeat. */
  readonly stack: string;
  readonly cause?: DescribedError;
}

/** An error as the log shows it: no other properties than these, and no text of a parser. */
function describeError(error: unknown, depth = 0): DescribedError | undefined {
  if (!(error instanceof Error)) {
    return error === undefined ? undefined : { type: typeof error, message: 'not an Error', stack: '' };
  }
  const code: unknown = 'code' in error ? error.code : undefined;
  const cause = depth < maxCauses ? describeError(error.cause, depth + 1) : undefined;
  return {
    type: error.name,
    ...(typeof code === 'string' || typeof code === 'number' ? { code } : {}),
    message: textOf(error).slice(0, maxTextCharacters),
    stack: placesOf(error).join('\n').slice(0, maxTextCharacters),
    ...(cause === undefined ? {} : { cause }),
  };
}

/** What failed and where, without the message: an unexpected error may quote anything. */
function wordless(error: unknown): Error {
  const text = new Error('withheld, because it may quote a request');
  const isError = error instanceof Error;
  return Object.assign(text, {
    name: isError ? error.name : typeof error,
    stack: isError ? placesOf(error).join('\n') : '',
  });
}

/**
 * Ends the process with code 1 on an uncaught error, after a line that follows this log's rules. Node itself would
 * print the error with all its properties; its warnings are logged by name.
 */
export function logCrashes(log: Log): void {
  process.on('uncaughtException', (error) => {
    log.fatal({ error: wordless(error) }, 'uncaught error');
    process.exit(1);
  });
  process.removeAllListeners('warning');
  process.on('warning', (warning) => log.warn({ warning: warning.name }, 'Node warning'));
}
