// The devices of a group's ranks, one process each, through NCCL by koffi: sums of partial results in each device's
// stream, over NVLink if available. Owns the communicator; knows no rows. All ranks hold the same bits after a sum.

import koffi, { type LibraryHandle } from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import type { ElementType } from '../shards/element-type.ts';
import type { CudaDevice, DeviceMemory } from './cuda-device.ts';
import type { DeviceGroupMember, DeviceLink, Reducer } from './reduce.ts';

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

/** This device's connection to those of the other ranks. `abort` ends it, joined or not. */
export class CudaLink implements DeviceLink {
  readonly #device: CudaDevice;
  #communicator: bigint | undefined;

  constructor(device: CudaDevice) {
    this.#device = device;
  }

  /** Empty without NCCL: partial sums then go through the host. */
  createGroupId(): Int32Array {
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

  join(groupId: Int32Array, { rank, worldSize, watch }: DeviceGroupMember): Reducer {
    const nccl = loadNccl();
    const out: [bigint | null] = [null];
    const id = { bytes: new Uint8Array(Int32Array.from(groupId).buffer) };
    check(nccl.commInitRank(out, worldSize, id, rank));
    this.#communicator = out[0] ?? undefined;
    this.#device.watch = (waitedMs) => {
      try {
        watch(waitedMs);
      } catch (error) {
        // A sum that waits for a lost rank would block the stream forever.
        this.abort();
        throw error;
      }
    };
    return { crossesHost: false, sum: (memory, count) => this.#sum(nccl, memory as DeviceMemory, count) };
  }

  /** Aborts sums that wait for lost ranks, and the communicator. Idempotent. */
  abort(): void {
    if (this.#communicator !== undefined) {
      loadNccl().commAbort(this.#communicator);
      this.#communicator = undefined;
    }
  }

  #sum(nccl: ReturnType<typeof bindNccl>, { address, type }: DeviceMemory, count: number): void {
    if (this.#communicator === undefined) {
      throw new ClusterError('unavailable', 'the group of devices is lost');
    }
    const { stream } = this.#device;
    check(nccl.allReduce(address, address, count, dataTypes[type], sumOperation, this.#communicator, stream));
  }
}
