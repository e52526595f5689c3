// The log of a process: one JSON object a line. A message is constant, what varies is a field (`requestId`, `tenant`,
// `model`, `group`, `rank`, `revision`). Prompts and completions are never logged; nothing here could know them.

import { pino, type DestinationStream, type Logger } from 'pino';

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

/** Makes the log of a process. Errors go in the field `error`, with their code, stack and cause. */
export function createLog(options: LogOptions): Log {
  const settings = {
    level: options.level,
    base: { process: options.process },
    timestamp: pino.stdTimeFunctions.isoTime,
    errorKey: 'error',
    formatters: { level: (label: string) => ({ level: label }) },
  };
  return options.destination === undefined ? pino(settings) : pino(settings, options.destination);
}
