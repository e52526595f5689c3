// The gateway as a process: `node gateway/src/main.ts`, configured by MIMO_GATEWAY_* (config.ts). SIGTERM drains it.

import { reportGrpcTo } from '@mimo/core/grpc/log';
import { runProcess } from '@mimo/core/process/run-process';

import { gatewaySettings, parseGatewayConfig } from './config.ts';
import { startGateway } from './gateway.ts';

await runProcess({
  name: 'gateway',
  settings: gatewaySettings,
  parse: parseGatewayConfig,
  graceMs: (config) => config.graceMs,
  start: async (parts) => {
    reportGrpcTo(parts.log);
    return startGateway(parts);
  },
});
