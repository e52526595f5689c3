// The controller as a process: environment -> configuration -> running controller; SIGTERM releases its lease. Only
// this file reads the environment or ends the process.

import { printableConfig } from '@mimo/core/process/config';
import { ClusterError } from '@mimo/core/process/errors';
import { exitCodeOf, Lifecycle, stopOnSignals } from '@mimo/core/process/lifecycle';
import { createLog, logCrashes } from '@mimo/core/process/log';

import { controllerSettings, parseControllerConfig } from './config.ts';
import { startController } from './controller.ts';

/** Releasing the lease takes one request; below Kubernetes' own 30 s. */
const graceMs = 10_000;

try {
  const config = parseControllerConfig(process.env);
  const log = createLog({ process: 'controller', level: config.logLevel });
  log.info({ config: printableConfig(controllerSettings, config), node: process.version }, 'starting');
  logCrashes(log);
  const lifecycle = new Lifecycle({ log, graceMs });
  stopOnSignals(lifecycle);
  const controller = await startController(config, log);
  lifecycle.onDrain('controller', () => controller.close());
  lifecycle.ready();
  controller.ended.catch((error: unknown) => {
    log.error({ error: ClusterError.from(error) }, 'controller ended');
    void lifecycle.stop('the controller ended').then(() => process.exit(1));
  });
} catch (error) {
  const known = ClusterError.from(error);
  process.stderr.write(`controller: ${known.message}\n`);
  process.exit(exitCodeOf(known));
}
