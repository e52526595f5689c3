// The controller as a process: `node controller/src/main.ts`, configured by MIMO_CONTROLLER_* (config.ts). SIGTERM
// releases its lease.

import { runProcess } from '@mimo/core/process/run-process';

import { controllerSettings, parseControllerConfig } from './config.ts';
import { startController } from './controller.ts';

/** Releasing the lease takes one request; below Kubernetes' own 30 s. */
const graceMs = 10_000;

await runProcess({
  name: 'controller',
  settings: controllerSettings,
  parse: parseControllerConfig,
  graceMs: () => graceMs,
  start: startController,
});
