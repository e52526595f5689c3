// One hostile input: what it sends, and how it must end. The corpus is a list of these; hostile.test.ts runs them against
// the processes of world.ts.

import type { ErrorCode } from '@mimo/core/process/errors';

import type { HostileWorld } from './world.ts';

/** How a call ended for its client. `ok`: it finished. `reset`: the connection or stream broke without a status. */
export interface CallEnd {
  readonly code: ErrorCode | 'ok' | 'reset';
  /** Of the status; empty where it finished. */
  readonly message: string;
}

interface HostileCase {
  /** Says the input, unique within its subject. */
  readonly name: string;
  /** Sends the input and reads to the end. A case cleans up after itself. */
  readonly send: (world: HostileWorld) => Promise<CallEnd>;
  /** The only right end; several where chance, such as a race with a deadline, decides. */
  readonly code: CallEnd['code'] | readonly CallEnd['code'][];
  /** What the message must say: the field, the limit, the value. */
  readonly message?: RegExp;
  /** The message may quote what its caller sent. */
  readonly quotes?: true;
}

/** The inputs of one kind, with the models that they need beside models/mimo-demo. */
export interface HostileSubject {
  readonly name: string;
  readonly cases: readonly HostileCase[];
  /** Writes checkpoints' front halves (config, tokenizer, template) below `directory`; gives their directories by name. */
  readonly writeModels?: (directory: string) => Promise<Readonly<Record<string, string>>>;
}
