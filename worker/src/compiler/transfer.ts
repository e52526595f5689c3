// Moves rows of a checkpoint tensor into shards, in each shard's storage form. Owns the band: a run of whole rows,
// small enough to bound memory for every tensor. Synchronous, for a compile thread; knows no graph.
// Every matrix is quantised whole and sliced after: blocks run along a row, so a band's blocks are the matrix's.

import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { ClusterError } from '@mimo/core/process/errors';
import { encodeHalves } from '../shards/element-type.ts';
import { decodeFloats, quantizeInt4, quantizeInt8 } from './quantize.ts';
import { elementBytes, type TensorLocation } from './safetensors.ts';
import { blockSize, type Range, rangeLength } from '../shards/shard-plan.ts';
import { type Form, rowBytes, storedTypes, type Transfer } from './weight-layout.ts';

/** Some rows of one tensor and every place, on any rank, that takes part of them. */
export interface TransferJob {
  /** Position in the compile's list of jobs. */
  readonly id: number;
  /** Bytes read from the checkpoint. */
  readonly bytes: number;
  readonly tensor: TensorLocation;
  readonly rows: Range;
  readonly columns: number;
  /** `file` is a path here. */
  readonly targets: readonly Transfer[];
}

/** Runs jobs one after another; keeps files open until closed. */
export interface Transferrer {
  /** Throws `data_loss` for a NaN or infinite weight, naming tensor and index, and for a file that ends too early. */
  run(job: TransferJob): void;
  close(): void;
}

/** Weights of a band: 4 MiB in bf16, 8 MiB as fp32. */
const bandElements = 2 ** 21;

/** The caller closes the result. */
export function createTransferrer(): Transferrer {
  const descriptors = new Map<string, number>();
  const descriptor = (path: string, flags: 'r' | 'r+'): number => {
    const open = descriptors.get(path) ?? openSync(path, flags);
    descriptors.set(path, open);
    return open;
  };

  return {
    run(job) {
      const bandRows = Math.max(1, Math.floor(bandElements / job.columns));
      for (let start = job.rows.start; start < job.rows.end; start += bandRows) {
        const rows = { start, end: Math.min(start + bandRows, job.rows.end) };
        const forms = readBand(descriptor(job.tensor.path, 'r'), job, rows);
        for (const target of job.targets) {
          writeTarget(descriptor(target.file, 'r+'), forms(target.form), {
            target,
            rows,
            columns: job.columns,
          });
        }
      }
    },
    close() {
      for (const open of descriptors.values()) {
        closeSync(open);
      }
      descriptors.clear();
    },
  };
}

/** A band in one form: whole rows, `rowBytes` each, and for quantised forms their scales. */
interface Band {
  readonly values: Uint8Array;
  readonly scales?: Uint8Array;
}

/** Reads a band once; creates each form on first use. */
function readBand(source: number, job: TransferJob, rows: Range): (form: Form) => Band {
  const { tensor, columns } = job;
  const count = rangeLength(rows) * columns;
  const bytes = new Uint8Array(count * elementBytes[tensor.dtype]);
  const position = tensor.offset + rows.start * columns * elementBytes[tensor.dtype];
  const bytesRead = readSync(source, bytes, 0, bytes.length, position);
  if (bytesRead !== bytes.length) {
    throw new ClusterError(
      'data_loss',
      `${tensor.path}: tensor ${tensor.name} ends ${bytes.length - bytesRead} bytes early`,
    );
  }
  const weights = new Float32Array(count); // [rows, columns]
  const nonFinite = decodeFloats(bytes, tensor.dtype, weights);
  if (nonFinite >= 0) {
    const index = rows.start * columns + nonFinite;
    const at = tensor.shape.length === 1 ? [index] : [Math.floor(index / columns), index % columns];
    throw new ClusterError(
      'data_loss',
      `tensor ${tensor.name}: element [${at.join(', ')}] is ${weights[nonFinite]}`,
    );
  }

  const made = new Map<Form, Band>();
  return (form) => {
    const band =
      made.get(form) ?? makeForm(form === storedTypes[tensor.dtype] ? 'stored' : form, bytes, weights);
    made.set(form, band);
    return band;
  };
}

function makeForm(form: Form, stored: Uint8Array, weights: Float32Array<ArrayBuffer>): Band {
  if (form === 'stored') {
    return { values: stored };
  }
  if (form === 'float') {
    return { values: new Uint8Array(weights.buffer) };
  }
  if (form === 'float16' || form === 'bfloat16') {
    return { values: new Uint8Array(encodeHalves(weights, form).buffer) };
  }
  const values = new Uint8Array(rowBytes(form, weights.length));
  const scales = new Float32Array(weights.length / blockSize);
  const quantize = form === 'int8' ? quantizeInt8 : quantizeInt4;
  quantize(weights, values, scales);
  return { values, scales: new Uint8Array(scales.buffer) };
}

interface Placement {
  readonly target: Transfer;
  /** Rows of the band. */
  readonly rows: Range;
  readonly columns: number;
}

function writeTarget(destination: number, band: Band, { target, rows, columns }: Placement): void {
  const wanted = { start: Math.max(rows.start, target.rows.start), end: Math.min(rows.end, target.rows.end) };
  if (wanted.start >= wanted.end) {
    return;
  }
  // Both the values and the scales of a row divide evenly among its columns' blocks.
  const write = (bytes: Uint8Array, offset: number): void => {
    const sourceRow = bytes.length / rangeLength(rows);
    const first = (sourceRow * target.columns.start) / columns;
    const targetRow = (sourceRow * rangeLength(target.columns)) / columns;
    const slice = sliceColumns(bytes, {
      rows: { start: wanted.start - rows.start, end: wanted.end - rows.start },
      sourceRow,
      first,
      targetRow,
    });
    const position = offset + (wanted.start - target.rows.start) * targetRow;
    let written = 0;
    while (written < slice.length) {
      written += writeSync(destination, slice, written, slice.length - written, position + written);
    }
  };
  write(band.values, target.offset);
  if (band.scales !== undefined) {
    write(band.scales, target.scalesOffset);
  }
}

/** Of rows of `sourceRow` bytes, the `targetRow` bytes from `first` of each. */
function sliceColumns(
  bytes: Uint8Array,
  slice: {
    readonly rows: Range;
    readonly sourceRow: number;
    readonly first: number;
    readonly targetRow: number;
  },
): Uint8Array {
  const { rows, sourceRow, first, targetRow } = slice;
  if (targetRow === sourceRow) {
    return bytes.subarray(rows.start * sourceRow, rows.end * sourceRow);
  }
  const sliced = new Uint8Array(rangeLength(rows) * targetRow);
  for (let row = rows.start, at = 0; row < rows.end; row++, at += targetRow) {
    const from = row * sourceRow + first;
    sliced.set(bytes.subarray(from, from + targetRow), at);
  }
  return sliced;
}
