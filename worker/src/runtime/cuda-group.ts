// The devices of a group's ranks, one process each, through NCCL by koffi: sums of partial results in the stream of each,
// over NVLink where there is one. Owns the communicator; knows no rows. All ranks hold the same bits after a sum.

import koffi, { type LibraryHandle } from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import type { ElementType } from '../shards/element-type.ts';
import type { DeviceGroupMember } from './reduce.ts';

const libraryName = 'libnccl.so.2';
const idBytes = 128;
const sumOperation = 0;

/** ncclDataType_t. */
const dataTypes: Readonly<Partial<Record<ElementType, number>>> = { float16: 6, float: 7, bfloat16: 9 };

function bindNccl(library: LibraryHandle) {
  const id = koffi.struct({ bytes: koffi.array('uint8_t', idBytes, 'Typed') });
  return {
    library,
    errorString: library.func('ncclGetErrorString', 'str', ['int']),
    getUniqueId: library.func('ncclGetUniqueId', 'int', ['void *']),
    commInitRank: library.func('ncclCommInitRank', 'int', ['_Out_ void **', 'int', id, 'int']),
    commAbort: library.func('ncclCommAbort', 'int', ['void *']),
    allReduce: library.func('ncclAllReduce', 'int', [
      'void *',
      'void *',
      'size_t',
      'int',
      'int',
      'void *',
      'void *',
    ]),
  };
}

/** Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
let loaded: ReturnType<typeof bindNccl> | undefined;

function loadNccl(): ReturnType<typeof bindNccl> {
  try {
    loaded ??= bindNccl(koffi.load(libraryName));
    return loaded;
  } catch (error) {
    throw new ClusterError(
      'failed_precondition',
      `executionProvider cuda with several ranks: needs ${libraryName} on the library path, as rank 0 has it: ${ClusterError.from(error).message}`,
      { cause: error },
    );
  }
}

function check(status: number): void {
  if (status !== 0) {
    throw new ClusterError('internal', `nccl: ${loaded?.errorString(status)}`);
  }
}

/** What all ranks of a group join with; empty without NCCL, and partial sums then cross the host. */
export function createCudaGroupId(): Int32Array {
  let nccl: ReturnType<typeof bindNccl>;
  try {
    nccl = loadNccl();
  } catch {
    return new Int32Array(0);
  }
  const id = new Int32Array(idBytes / 4);
  check(nccl.getUniqueId(id));
  return id;
}

/** This rank's communicator. `abort` ends it. */
export class CudaGroup {
  readonly #nccl = loadNccl();
  #communicator: bigint | undefined;

  /** Blocks until all ranks have come. */
  constructor(id: Int32Array, { rank, worldSize }: DeviceGroupMember) {
    const out: [bigint | null] = [null];
    check(
      this.#nccl.commInitRank(out, worldSize, { bytes: new Uint8Array(Int32Array.from(id).buffer) }, rank),
    );
    this.#communicator = out[0] ?? undefined;
  }

  /** Replaces `count` elements by their sums over the ranks, in the stream. */
  sum(
    address: bigint,
    { type, count, stream }: { readonly type: ElementType; readonly count: number; readonly stream: bigint },
  ): void {
    if (this.#communicator === undefined) {
      throw new ClusterError('unavailable', 'the group of devices is lost');
    }
    check(
      this.#nccl.allReduce(
        address,
        address,
        count,
        dataTypes[type],
        sumOperation,
        this.#communicator,
        stream,
      ),
    );
  }

  /** Ends sums that wait for lost ranks, and the communicator. Idempotent. */
  abort(): void {
    if (this.#communicator !== undefined) {
      this.#nccl.commAbort(this.#communicator);
      this.#communicator = undefined;
    }
  }
}
