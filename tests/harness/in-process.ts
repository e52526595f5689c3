// A gateway or controller in the test's own process: its parts, with the test in control of the lifecycle that
// runProcess would own. Asserts nothing.

import { Lifecycle } from '@mimo/core/process/lifecycle';
import type { Log } from '@mimo/core/process/log';
import type { ProcessParts } from '@mimo/core/process/run-process';
import type { GatewayConfig } from '@mimo/gateway/config';
import { startGateway, type Gateway } from '@mimo/gateway/gateway';

/** The end of what `startInProcess` has started. Both may be called twice. */
export interface InProcess {
  /** Drains as after SIGTERM, within this time; resolves when it has drained. It is open until `close`. */
  drain(graceMs: number): Promise<void>;
  /** Drains, where it has not, within the time that `startInProcess` was given; then closes. */
  close(): Promise<void>;
}

/** Starts it as its main.ts does. `graceMs` is what `close` takes for draining. The caller closes it. */
export async function startInProcess<Config, Running extends object>(
  start: (parts: ProcessParts<Config>) => Promise<Running>,
  given: { readonly config: Config; readonly log: Log; readonly graceMs: number },
): Promise<Running & InProcess> {
  const { config, log, graceMs } = given;
  const lifecycle = new Lifecycle({ log, graceMs });
  try {
    const running = await start({ config, log, lifecycle });
    lifecycle.ready();
    const drained = Promise.withResolvers<void>();
    const closing = Promise.withResolvers<void>();
    lifecycle.onDrain('test', () => {
      drained.resolve();
      return closing.promise;
    });
    return Object.assign(running, {
      drain: (drainMs: number) => {
        void lifecycle.stop('test', drainMs);
        return drained.promise;
      },
      close: () => {
        closing.resolve();
        return lifecycle.stop('test');
      },
    });
  } catch (error) {
    await lifecycle.stop('test');
    throw error;
  }
}

/** A gateway that ends its requests when it is closed. */
export type TestGateway = Gateway & InProcess;

/** Starts a gateway in this process. The caller closes it, which ends its requests. */
export async function openGateway(config: GatewayConfig, log: Log): Promise<TestGateway> {
  return startInProcess(startGateway, { config, log, graceMs: 0 });
}
