// The gateway as a third-party client sees it: `buf curl`, a gRPC client in Go without our code or protos, which learns
// the API from the server's reflection.

import { execFile } from 'node:child_process';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { BadRequest } from '@mimo/proto/error-details';

import { startTestCluster, type TestCluster } from '../harness/cluster.ts';

const buf = join(import.meta.dirname, '../../node_modules/.bin/buf');
const service = 'mimo.inference.v1.InferenceService';

interface Outcome {
  readonly stdout: string;
  readonly stderr: string;
  readonly failed: boolean;
}

let cluster: TestCluster;

beforeAll(async () => {
  cluster = await startTestCluster();
});

afterAll(() => cluster.close());

/** Runs `buf curl` against the gateway, in a folder without any proto. */
async function curl(path: string, ...args: readonly string[]): Promise<Outcome> {
  const url = `http://${cluster.parts.gatewayAddress}${path}`;
  const { promise, resolve } = Promise.withResolvers<Outcome>();
  execFile(
    buf,
    ['curl', '--protocol', 'grpc', '--http2-prior-knowledge', ...args, url],
    { cwd: tmpdir() },
    (error, stdout, stderr) => resolve({ stdout, stderr, failed: error !== null }),
  );
  return promise;
}

describe('a foreign gRPC client', () => {
  it('lists exactly the services of the gateway', async () => {
    const { stdout } = await curl('', '--list-services');
    expect(stdout.trim().split('\n').toSorted()).toEqual([
      'grpc.health.v1.Health',
      'grpc.reflection.v1.ServerReflection',
      'grpc.reflection.v1alpha.ServerReflection',
      service,
    ]);
  });

  it('streams a chat', async () => {
    const request = {
      model: cluster.modelName,
      messages: [{ role: 'ROLE_USER', content: 'What is 47 + 85?' }],
      sampling: { temperature: 0 },
    };
    const { stdout, failed } = await curl(`/${service}/Chat`, '--data', JSON.stringify(request));
    expect(failed).toBe(false);
    const events = JSON.parse(`[${stdout.trim().replaceAll(/\}\n\{/g, '},{')}]`) as {
      started?: { requestId: string };
      delta?: { text?: string; reasoning?: string };
      finish?: { reason: string; usage: { completionTokens: number } };
    }[];
    expect(events[0]?.started?.requestId).toMatch(/\S/);
    const text = events.map(({ delta }) => delta?.text ?? '').join('');
    expect(text.trim()).toBe('132');
    expect(events.map(({ delta }) => delta?.reasoning ?? '').join('')).toContain('[132]');
    expect(events.at(-1)?.finish?.reason).toBe('FINISH_REASON_STOP');
    expect(events.filter(({ finish }) => finish !== undefined)).toHaveLength(1);
  });

  it('gets an error that names every invalid field', async () => {
    const request = {
      model: cluster.modelName,
      messages: [{ role: 'ROLE_USER', content: 'hi' }],
      sampling: { temperature: -1, topP: 0, stop: [''] },
    };
    const { stderr, failed } = await curl(`/${service}/Chat`, '--data', JSON.stringify(request));
    expect(failed).toBe(true);
    const error = JSON.parse(stderr) as {
      code: string;
      details: readonly { type: string; value: string }[];
    };
    expect(error.code).toBe('invalid_argument');
    const detail = error.details.find(({ type }) => type === 'google.rpc.BadRequest');
    const { fieldViolations } = BadRequest.decode(Buffer.from(detail?.value ?? '', 'base64'));
    expect(fieldViolations.map(({ field }) => field)).toEqual([
      'sampling.temperature',
      'sampling.top_p',
      'sampling.stop[0]',
    ]);
  });

  it('gets NOT_FOUND for an unknown model', async () => {
    const request = { model: 'nobody/knows', messages: [{ role: 'ROLE_USER', content: 'hi' }] };
    const { stderr } = await curl(`/${service}/Chat`, '--data', JSON.stringify(request));
    expect(JSON.parse(stderr)).toMatchObject({ code: 'not_found' });
  });
});
