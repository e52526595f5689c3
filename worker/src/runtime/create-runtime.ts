// Chooses and loads an implementation of the runtime and its execution provider. Owns that choice and the messages that
// name missing parts; loads only the chosen implementation.

import { ClusterError } from '@mimo/core/process/errors';
import {
  executionProviders,
  type Runtime,
  type RuntimeImplementation,
  type RuntimeOptions,
} from './runtime.ts';

/**
 * Loads ONNX Runtime. Errors: `invalid_argument` for an unknown provider or thread count, `failed_precondition` naming
 * the missing part. The caller closes it. One implementation per process: ONNX Runtime's environment is global, and the
 * first runtime of a process sets its threads.
 */
export async function createRuntime(options: RuntimeOptions): Promise<Runtime> {
  const { executionProvider, implementation } = options;
  if (!executionProviders.includes(executionProvider)) {
    throw new ClusterError(
      'invalid_argument',
      `executionProvider: must be one of ${executionProviders.join(', ')}, is ${executionProvider as string}`,
    );
  }
  if (executionProvider !== 'cpu' && implementation === 'ort-node') {
    throw new ClusterError(
      'invalid_argument',
      `executionProvider: ${executionProvider} needs runtime ort-capi, is ort-node`,
    );
  }
  if (!Number.isInteger(options.intraOpThreads) || options.intraOpThreads < 1) {
    throw new ClusterError(
      'invalid_argument',
      `intraOpThreads: must be at least 1, is ${options.intraOpThreads}`,
    );
  }
  if (implementation === 'ort-node') {
    return await createOrtNode(options);
  }
  try {
    const { createOrtCapiRuntime } = await import('./ort-capi.ts');
    return createOrtCapiRuntime(options);
  } catch (error) {
    if (error instanceof ClusterError) {
      throw error;
    }
    if (implementation === 'auto' && executionProvider === 'cpu') {
      return await createOrtNode(options);
    }
    throw missing('ort-capi', 'packages koffi and onnxruntime-node', error);
  }
}

async function createOrtNode(options: RuntimeOptions): Promise<Runtime> {
  try {
    const { createOrtNodeRuntime } = await import('./ort-node.ts');
    return createOrtNodeRuntime(options);
  } catch (error) {
    // onnxruntime-node's own script fetches a CUDA library that nothing here uses, and fails without access to NuGet.
    const needs =
      'package onnxruntime-node, which npm leaves out if its install script fails (add --ignore-scripts)';
    throw missing('ort-node', needs, error);
  }
}

function missing(implementation: RuntimeImplementation, needs: string, cause: unknown): ClusterError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new ClusterError(
    'failed_precondition',
    `runtime ${implementation} is not available on ${process.platform}-${process.arch}; it needs the ${needs}: ${reason}`,
    { cause },
  );
}
