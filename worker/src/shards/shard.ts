// The output of `compile` and input of the runtime: one directory per rank with ONNX graphs, the weights file that they
// refer to, and this manifest. Owns the names of segments and of their inputs and outputs, and reading the manifest;
// knows no session.
//
// Every weight lives in exactly one segment. `rows` is dynamic everywhere: the rows of one step, all sequences
// together. H hidden size; T tensorParallel; D head dim; Qr = query heads / T; Kr = KV heads / T; Vr = this rank's
// vocabulary rows.
//
//   embed              tokenIds int32 [rows]                            -> hidden [rows, H]
//   layer.{i}.qkv      residual [rows, H], delta [rows, H]              -> residualOut [rows, H], qkv [rows, (Qr + 2 Kr) D]
//   attention          qkv [1, s, (Qr + 2 Kr) D], pastKey [1, Kr, cap, D], pastValue, seqlensK int32 [1],
//                      totalLength int32 []                             -> attended [1, s, Qr D], presentKey, presentValue
//                      (bound in place: present is the same memory as past)
//   attention.paged    qkv [rows, (Qr + 2 Kr) D], keys [pages, 256, Kr, D], values, starts int32 [spans + 1],
//                      past int32 [spans], table int32 [spans, n], bounds int32 [3]
//                                                                       -> attended [rows, Qr D], keysOut, valuesOut
//                      (all spans in one run; bound in place; bf16 shards have this one only, fp16 shards both)
//   layer.{i}.o        attended [rows, Qr D]                            -> delta [rows, H] (partial sum over ranks)
//   layer.{i}.mlp      residual [rows, H], delta [rows, H]              -> residualOut [rows, H], deltaOut [rows, H] (partial)
//   final              residual [rows, H], delta [rows, H]              -> hidden [rows, H] (pre-norm), normed [rows, H]
//   head               normed [rows, H], headRows int32 [n]             -> logits [n, Vr] of those rows
//   best               logits [n, Vr], end int64 [1]                    -> best [n, 2]: the largest logit of the ids below
//                      (profiles with best)                                 vocabStart + end, and its id, the lowest at ties
//   mtp.{j}.input      hidden [all, H], hiddenRows int32 [rows], embedding [rows, H]
//                                                                       -> residual [rows, H] (W_in . [norm(hidden) ; norm(embedding)])
//   mtp.{j}.qkv .o .mlp .final: the same signatures as a layer's and the backbone's `final`; the shared `head` follows.
//
// `qkv` first adds: residualOut = residual + delta, then normalises residualOut. Layer 0 is fed a zero delta. So does
// `mlp` (with the all-reduced output of `o`), and `final` (with the all-reduced output of the last `mlp`).
// One `attention` segment serves every layer and the MTP layers, since they share head counts and RoPE.

import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import type { ModelConfig } from './model-config.ts';
import type { TargetProfile } from './target-profile.ts';

/** Positions of a page. The fastest kernel needs its tile of positions within one page. */
export const pageTokens = 256;

/** Segment file names by segment name, e.g. `layer.0.qkv` -> `layer.0.qkv.onnx`. */
export interface SegmentEntry {
  readonly name: string;
  readonly file: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  /** The position of each of its weights, by its name in the graph. */
  readonly weights: Readonly<Record<string, WeightSlice>>;
}

/** Bytes of one of the shard's files. */
export interface WeightSlice {
  readonly file: string;
  readonly offset: number;
  readonly bytes: number;
}

/** `shard.json` of one rank's directory. */
export interface ShardManifest {
  readonly formatVersion: number;
  /** Hash of checkpoint contents, profile, tensorParallel, format and graph options; equal on all ranks of a group. */
  readonly key: string;
  readonly profile: TargetProfile;
  readonly tensorParallel: number;
  readonly rank: number;
  readonly config: ModelConfig;
  /** First vocabulary row of this rank's part of the head, and how many. The parts of all ranks cover vocabSize. */
  readonly vocabStart: number;
  readonly vocabRows: number;
  /** Positions that the RoPE tables in `attention` cover. */
  readonly maxPositions: number;
  /** Which hidden state feeds the MTP layer: before the backbone's final norm (Xiaomi's own code) or after it. */
  readonly mtpHidden: 'pre-norm' | 'post-norm';
  readonly segments: readonly SegmentEntry[];
  /** The weight files that the segments point into, with their sizes in bytes. */
  readonly files: Readonly<Record<string, number>>;
}

/** Raised whenever graphs, layout or manifest change; part of the key. */
export const shardFormatVersion = 5;

/** The manifest's name inside a rank's directory. */
export const manifestFile = 'shard.json';

/**
 * Reads a rank's manifest and checks that its segments and weight files are complete. Throws `not_found` without
 * a manifest, `failed_precondition` for another format version and `data_loss` if a file is missing or short.
 */
export async function readShardManifest(directory: string): Promise<ShardManifest> {
  const path = join(directory, manifestFile);
  const text = await readFile(path, 'utf8').catch((error: unknown) => {
    throw new ClusterError('not_found', `${directory}: has no ${manifestFile}`, { cause: error });
  });
  const manifest = parseManifest(text, path);
  for (const { file } of manifest.segments) {
    await assertFile(directory, file);
  }
  for (const [file, bytes] of Object.entries(manifest.files)) {
    const { size } = await assertFile(directory, file);
    if (size !== bytes) {
      throw new ClusterError('data_loss', `${join(directory, file)}: must have ${bytes} bytes, has ${size}`);
    }
  }
  return manifest;
}

function parseManifest(text: string, path: string): ShardManifest {
  let manifest: ShardManifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new ClusterError('data_loss', `${path}: is not JSON`, { cause: error });
  }
  if (manifest.formatVersion !== shardFormatVersion) {
    throw new ClusterError(
      'failed_precondition',
      `${path}: formatVersion must be ${shardFormatVersion}, is ${manifest.formatVersion}: compile the model again`,
    );
  }
  return manifest;
}

async function assertFile(directory: string, file: string): Promise<{ size: number }> {
  return stat(join(directory, file)).catch((error: unknown) => {
    throw new ClusterError('data_loss', `${join(directory, file)}: is missing`, { cause: error });
  });
}
