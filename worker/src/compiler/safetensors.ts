// Reads and validates the headers of safetensors files. Owns the file format; knows no model. Reads no tensor data: a
// TensorLocation holds its position, and readers use positional reads.
// Source: the safetensors format (8-byte little-endian header length, JSON header, data without holes).

import { open, type FileHandle } from 'node:fs/promises';
import { basename } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';

/** The supported element types, with their size in bytes. */
export const elementBytes = { BF16: 2, F16: 2, F32: 4 } as const;

export type ElementDtype = keyof typeof elementBytes;

/** Where one tensor's data lies; `offset` counts from the start of the file. */
export interface TensorLocation {
  readonly name: string;
  readonly dtype: ElementDtype;
  readonly shape: readonly number[];
  readonly path: string;
  readonly offset: number;
  readonly bytes: number;
}

/** The limit of the format's own library. */
const headerMaxBytes = 100_000_000;
const lengthBytes = 8;

/**
 * Reads and checks one file's header. Throws `not_found` without the file and `data_loss`, naming file, tensor, limit
 * and value, if header and file disagree: truncation, an absurd header length, broken JSON, a duplicate name, an
 * unknown dtype, a byte length that does not fit the shape, overlapping data, holes, or bytes left over.
 */
export async function readSafetensorsHeader(path: string): Promise<TensorLocation[]> {
  const file = await open(path).catch((error: unknown) => {
    throw new ClusterError('not_found', `${path}: cannot be opened: ${ClusterError.from(error).message}`, {
      cause: error,
    });
  });
  try {
    const { size } = await file.stat();
    const header = await readHeaderText(file, path, size);
    return parseHeader({ path, header, dataBytes: size - lengthBytes - Buffer.byteLength(header) });
  } finally {
    await file.close();
  }
}

async function readHeaderText(file: FileHandle, path: string, fileBytes: number): Promise<string> {
  const fail = failure(path);
  if (fileBytes < lengthBytes) {
    throw fail(`is truncated: a header length takes ${lengthBytes} bytes, the file has ${fileBytes}`);
  }
  const length = Buffer.alloc(lengthBytes);
  await file.read(length, 0, lengthBytes, 0);
  const headerBytes = Number(length.readBigUInt64LE());
  const limit = Math.min(headerMaxBytes, fileBytes - lengthBytes);
  if (headerBytes > limit) {
    throw fail(`header length must be at most ${limit} bytes, is ${headerBytes}`);
  }
  const header = Buffer.alloc(headerBytes);
  await file.read(header, 0, headerBytes, lengthBytes);
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(header);
  } catch (error) {
    throw fail('header is not UTF-8', error);
  }
}

function parseHeader(source: {
  readonly path: string;
  readonly header: string;
  readonly dataBytes: number;
}): TensorLocation[] {
  const { path, header, dataBytes } = source;
  const fail = failure(path);
  const entries = parseEntries(header, fail);
  const dataStart = lengthBytes + Buffer.byteLength(header);

  const tensors = entries.map(([name, entry]) => {
    const { dtype, shape, data_offsets: offsets } = isRecord(entry) ? entry : {};
    if (!isDtype(dtype)) {
      const known = Object.keys(elementBytes).join(', ');
      throw fail(`tensor ${name}: dtype must be one of ${known}, is ${JSON.stringify(dtype)}`);
    }
    if (!isCounts(shape)) {
      throw fail(`tensor ${name}: shape must be a list of counts, is ${JSON.stringify(shape)}`);
    }
    if (!isCounts(offsets) || offsets.length !== 2) {
      throw fail(`tensor ${name}: data_offsets must be two counts, are ${JSON.stringify(offsets)}`);
    }
    const [begin = 0, end = 0] = offsets;
    if (begin > end || end > dataBytes) {
      throw fail(
        `tensor ${name}: data_offsets must lie within the file's ${dataBytes} data bytes, are ${begin} to ${end}`,
      );
    }
    const bytes = shape.reduce((product, dim) => product * dim, elementBytes[dtype]);
    if (bytes !== end - begin) {
      throw fail(
        `tensor ${name}: ${dtype} [${shape.join(', ')}] takes ${bytes} bytes, data_offsets span ${end - begin}`,
      );
    }
    return { name, dtype, shape, path, offset: dataStart + begin, bytes };
  });
  assertContiguous(tensors, { dataStart, dataEnd: dataStart + dataBytes, fail });
  return tensors;
}

function parseEntries(header: string, fail: Failure): [string, unknown][] {
  let parsed: unknown;
  try {
    parsed = JSON.parse(header);
  } catch (error) {
    throw fail(`header is not JSON: ${ClusterError.from(error).message}`, error);
  }
  if (!isRecord(parsed)) {
    throw fail('header must be a JSON object');
  }
  const seen = new Set<string>();
  for (const key of topLevelKeys(header)) {
    if (seen.has(key)) {
      throw fail(`tensor ${key} appears twice in the header`);
    }
    seen.add(key);
  }
  return Object.entries(parsed).filter(([name]) => name !== '__metadata__');
}

/** JSON.parse silently keeps the last of two equal keys, so the keys are read from the text. */
function topLevelKeys(json: string): string[] {
  const keys: string[] = [];
  let depth = 0;
  let text = '';
  for (const [token] of json.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]:]/g)) {
    if (token === ':') {
      if (depth === 1) {
        keys.push(String(JSON.parse(text)));
      }
    } else if (token.startsWith('"')) {
      text = token;
    } else {
      depth += token === '{' || token === '[' ? 1 : -1;
    }
  }
  return keys;
}

function assertContiguous(
  tensors: readonly TensorLocation[],
  file: { readonly dataStart: number; readonly dataEnd: number; readonly fail: Failure },
): void {
  let end = file.dataStart;
  let before = 'the header';
  for (const tensor of tensors.toSorted((a, b) => a.offset - b.offset || a.bytes - b.bytes)) {
    if (tensor.offset < end) {
      throw file.fail(`tensor ${tensor.name} overlaps ${before} by ${end - tensor.offset} bytes`);
    }
    if (tensor.offset > end) {
      throw file.fail(
        `${tensor.offset - end} bytes between ${before} and tensor ${tensor.name} belong to no tensor`,
      );
    }
    end = tensor.offset + tensor.bytes;
    before = `tensor ${tensor.name}`;
  }
  if (end !== file.dataEnd) {
    throw file.fail(`${file.dataEnd - end} bytes after ${before} belong to no tensor`);
  }
}

type Failure = (problem: string, cause?: unknown) => ClusterError;

function failure(path: string): Failure {
  return (problem, cause) => new ClusterError('data_loss', `${basename(path)}: ${problem}`, { cause });
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0);
}

function isDtype(value: unknown): value is ElementDtype {
  return typeof value === 'string' && Object.hasOwn(elementBytes, value);
}
