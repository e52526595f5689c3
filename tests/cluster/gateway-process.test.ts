// The gateway as a pod runs it: a process, its environment, its signals and its exit code.

import type { ChildProcess } from 'node:child_process';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import {
  HealthCheckResponse_ServingStatus as ServingStatus,
  HealthClient,
  HealthService,
} from '@mimo/proto/health';
import { GenerateRequest, InferenceServiceClient, InferenceServiceService } from '@mimo/proto/inference';
import { afterEach, describe, expect, it } from 'vitest';

import { startGatewayProcess, type GatewayProcess } from '../harness/gateway-process.ts';
import { startScriptedGroup, type ScriptedGroup } from '../harness/scripted-group.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = join(import.meta.dirname, '../..');
const model = 'mimo-demo';

let group: ScriptedGroup | undefined;
let child: ChildProcess | undefined;

afterEach(async () => {
  child?.kill('SIGKILL');
  await group?.close();
  child = undefined;
  group = undefined;
});

function run(env: Record<string, string>): GatewayProcess {
  const started = startGatewayProcess(env);
  child = started.child;
  return started;
}

describe('the gateway process', () => {
  it('finishes its streams on SIGTERM, not ready meanwhile, and exits with 0', async () => {
    group = await startScriptedGroup({ model, group: 'g', queue: undefined, stepMs: 5 });
    const gateway = run({
      MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
      MIMO_GATEWAY_METRICS_LISTEN: '127.0.0.1:0',
      MIMO_GATEWAY_MODELS: `${model}=${join(root, 'models/mimo-demo')}`,
      MIMO_GATEWAY_WORKERS: group.address,
    });
    const address = await gateway.address();
    const client = new InferenceServiceClient(address, grpc.credentials.createInsecure());
    const health = new HealthClient(address, grpc.credentials.createInsecure());
    const check = (): Promise<unknown> =>
      callUnary(health, HealthService.check, { request: { service: '' } });
    expect(await check()).toEqual({ status: ServingStatus.SERVING });

    const value = 'a prompt that is said again, token by token, while the process is asked to stop '.repeat(
      4,
    );
    const request = GenerateRequest.fromPartial({ model, input: { $case: 'prompt', value } });
    let text = '';
    let finished = false;
    for await (const { event } of callServerStream(client, InferenceServiceService.generate, { request })) {
      if (event?.$case === 'delta') {
        if (text === '') {
          gateway.child.kill('SIGTERM');
          await waitFor('not ready', async () => JSON.stringify(await check()) !== '{"status":1}');
        }
        text += event.value.text;
      }
      finished ||= event?.$case === 'finish';
    }
    expect([text, finished]).toEqual([value, true]);
    expect(await gateway.exited).toEqual([0, null]);
    client.close();
    health.close();
    expect(gateway.lines.filter((line) => line.includes('"level":"error"'))).toEqual([]);
    // Nothing of a prompt or a completion is in the log.
    expect(gateway.lines.join('\n')).not.toContain('said again');
  });

  it('reports every problem of its environment, and exits with 78', async () => {
    const gateway = run({
      MIMO_GATEWAY_LISTEN: 'here',
      MIMO_GATEWAY_NATS: 'nats://127.0.0.1:1',
      MIMO_GATEWAY_TYP0: '1',
    });
    expect(await gateway.exited).toEqual([78, null]);
    const said = gateway.lines.join('\n');
    expect(said).toContain('MIMO_GATEWAY_LISTEN must be host:port');
    expect(said).toContain('MIMO_GATEWAY_TYP0 is not a setting');
  });

  it('names the model directory that it cannot use, and exits with 78', async () => {
    const gateway = run({ MIMO_GATEWAY_MODELS: 'm=/nowhere', MIMO_GATEWAY_NATS: 'nats://127.0.0.1:1' });
    expect(await gateway.exited).toEqual([78, null]);
    expect(gateway.lines.join('\n')).toContain('model m: cannot read /nowhere/config.json');
  });
});
