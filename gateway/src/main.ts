// The gateway as a process: environment -> configuration -> running gateway; SIGTERM drains it. Nothing else of the
// gateway reads the environment or ends the process.

import { printableConfig } from '@mimo/core/process/config';
import { ClusterError } from '@mimo/core/process/errors';
import { reportGrpcTo } from '@mimo/core/grpc/log';
import { exitCodeOf, Lifecycle, stopOnSignals } from '@mimo/core/process/lifecycle';
import { createLog, logCrashes } from '@mimo/core/process/log';

import { gatewaySettings, parseGatewayConfig } from './config.ts';
import { startGateway } from './gateway.ts';

try {
  const config = parseGatewayConfig(process.env);
  const log = createLog({ process: 'gateway', level: config.logLevel });
  log.info({ config: printableConfig(gatewaySettings, config), node: process.version }, 'starting');
  logCrashes(log);
  reportGrpcTo(log);
  const lifecycle = new Lifecycle({ log, graceMs: config.graceMs });
  stopOnSignals(lifecycle);
  const gateway = await startGateway(config, log);
  lifecycle.onDrain('requests', (signal) => gateway.drain(signal));
  lifecycle.onClose('gateway', () => gateway.close());
  lifecycle.ready();
} catch (error) {
  const known = ClusterError.from(error);
  process.stderr.write(`gateway: ${known.message}\n`);
  process.exit(exitCodeOf(known));
}
