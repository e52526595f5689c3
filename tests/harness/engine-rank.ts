// A separate process that runs one rank of a network group: started by engine-ranks.ts with EngineOptions as its
// argument, and driven over IPC. Dies with its parent.

import { ClusterError } from '@mimo/core/process/errors';
import {
  startEngine,
  type EngineFrame,
  type EngineOptions,
  type SequenceRequest,
} from '@mimo/worker/engines/mimo/engine-host';

/** From the parent. */
export type RankRequest =
  | { readonly kind: 'submit'; readonly request: SequenceRequest }
  | { readonly kind: 'close' };

/** To the parent; `rejected`: startEngine threw; `failed`: the group was lost later. */
export type RankResponse =
  | { readonly kind: 'ready' }
  | { readonly kind: 'frame'; readonly frame: EngineFrame }
  | { readonly kind: 'rejected' | 'failed'; readonly code: string; readonly message: string };

const respond = (response: RankResponse): void => {
  process.send?.(response);
};

process.once('disconnect', () => process.exit(0));
try {
  const host = await startEngine(JSON.parse(process.argv[2] ?? '{}') as EngineOptions);
  host.onFrame((frame) => respond({ kind: 'frame', frame }));
  void host.failed.then(({ code, message }) => respond({ kind: 'failed', code, message }));
  process.on('message', (request: RankRequest) => {
    if (request.kind === 'submit') {
      host.submit(request.request);
    } else {
      void host.close().then(() => process.disconnect?.());
    }
  });
  respond({ kind: 'ready' });
} catch (error) {
  const { code, message } = ClusterError.from(error);
  respond({ kind: 'rejected', code, message });
}
