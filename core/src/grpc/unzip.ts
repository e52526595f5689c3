// Compressed requests, unzipped with a bound on the result: grpc-js unzips up to its largest message on the main
// thread, so that 16 kB can cost 16 MB. Text shrinks to a third, repetitive text to a tenth; a request that grows to
// more than 64 times its size is rejected as soon as it does.

import { promisify } from 'node:util';
import { gunzip, inflate } from 'node:zlib';

import { status, type StatusObject } from '@grpc/grpc-js';
import { BaseServerInterceptingCall } from '@grpc/grpc-js/build/src/server-interceptors.js';

import { ClusterError } from '../process/errors.ts';

const maxGrowth = 64;
/** Short texts may repeat one letter. */
const freeBytes = 64 * 2 ** 10;
/** Of the flag and the length. */
const prefixBytes = 5;
/** Each turn of the main thread. */
const chunkSize = 2 ** 18;

/** The largest result of a compressed message. */
export function maxUnzippedBytes(compressedBytes: number, maxMessageBytes: number): number {
  return Math.min(maxMessageBytes, freeBytes + maxGrowth * compressedBytes);
}

/** What of a call of grpc-js is used; gate.test.ts notices when a release keeps it elsewhere. */
interface UnzippingCall {
  /** -1: any. */
  readonly maxReceiveMessageSize: number;
}

function refuse(code: status, details: string): Pick<StatusObject, 'code' | 'details'> {
  return { code, details };
}

const hook = 'decompressMessage';
const unzips = new Map([
  ['gzip', promisify(gunzip)],
  ['deflate', promisify(inflate)],
]);

/** Makes the servers of this process unzip this way from now on. Idempotent. */
export function boundUnzipping(): void {
  if (typeof Reflect.get(BaseServerInterceptingCall.prototype, hook) !== 'function') {
    throw new ClusterError('internal', `this version of grpc-js does not unzip in ${hook}`);
  }
  Reflect.set(BaseServerInterceptingCall.prototype, hook, unzip);
}

function unzip(this: UnzippingCall, message: Buffer, encoding: string): Buffer | Promise<Buffer> {
  const contents = message.subarray(prefixBytes);
  if (encoding === 'identity') {
    return contents;
  }
  const maxMessageBytes = this.maxReceiveMessageSize === -1 ? Infinity : this.maxReceiveMessageSize;
  return unzipBounded(contents, encoding, maxUnzippedBytes(contents.length, maxMessageBytes));
}

/** Rejects with a status, as grpc-js expects it. */
async function unzipBounded(contents: Buffer, encoding: string, maxOutputLength: number): Promise<Buffer> {
  const unzipAll = unzips.get(encoding);
  if (unzipAll === undefined) {
    throw refuse(status.UNIMPLEMENTED, 'grpc-encoding must be identity, gzip or deflate');
  }
  try {
    return await unzipAll(contents, { maxOutputLength, chunkSize });
  } catch (error) {
    const isTooLarge = error instanceof Error && 'code' in error && error.code === 'ERR_BUFFER_TOO_LARGE';
    throw isTooLarge
      ? refuse(
          status.RESOURCE_EXHAUSTED,
          `the request has ${contents.length} bytes and unzips to more than ${maxOutputLength}, the limit`,
        )
      : refuse(status.INVALID_ARGUMENT, `the request is not valid ${encoding}`);
  }
}
