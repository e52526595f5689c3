// One hostile input and its required end. The corpus is a list of these; hostile.test.ts runs them
// against the processes of world.ts.

import type { CallEnd } from './raw-call.ts';
import type { HostileWorld, ModelWriter } from './world.ts';

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
export interface HostileSubject extends ModelWriter {
  readonly name: string;
  readonly cases: readonly HostileCase[];
}
