// The image's other command, run by `helm test`: checks as a client that a gateway serves, and lists its models. Reads
// its arguments and $MIMO_API_KEY; prints one line, and exits with 0 if the answer is as expected.

import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';
import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { callUnary, channelOptions } from '@mimo/core/grpc/client';
import {
  HealthCheckResponse_ServingStatus as ServingStatus,
  HealthClient,
  HealthService,
} from '@mimo/proto/health';
import { InferenceServiceClient, InferenceServiceService, type Model } from '@mimo/proto/inference';

const usage = `check.ts --address HOST:PORT [--closed] [--timeout-seconds 60]
  --closed  nobody may get in without an API key; the default is that $MIMO_API_KEY, if any, does`;
const maxReceiveBytes = 2 ** 20;
const pollMs = 500;

interface Check {
  readonly address: string;
  readonly apiKey: string | undefined;
  /** Expects `unauthenticated` instead of a list. */
  readonly closed: boolean;
}

/** Waits until the gateway serves, then lists its models. Resolves with the line to print; fails with the problem. */
async function check({ address, apiKey, closed }: Check, signal: AbortSignal): Promise<string> {
  const credentials = grpc.credentials.createInsecure();
  const options = channelOptions(maxReceiveBytes);
  const health = new HealthClient(address, credentials, options);
  const inference = new InferenceServiceClient(address, credentials, options);
  try {
    await untilServing(health, signal);
    const metadata = new grpc.Metadata();
    if (apiKey !== undefined) {
      metadata.set('authorization', `Bearer ${apiKey}`);
    }
    const listing = callUnary(inference, InferenceServiceService.listModels, {
      signal,
      metadata,
      request: {},
    });
    const answer = await listing.then(
      ({ models }) => models,
      (error: unknown) => ClusterError.from(error),
    );
    if (!closed) {
      if (answer instanceof ClusterError) {
        throw answer;
      }
      return `serving ${answer.map(nameAndGroups).join(', ') || 'no model yet'}`;
    }
    if (!(answer instanceof ClusterError)) {
      throw new ClusterError('internal', 'the gateway accepts callers without an API key, and should not');
    }
    if (answer.code !== 'unauthenticated') {
      throw answer;
    }
    return 'serving, and calls without an API key are rejected';
  } finally {
    health.close();
    inference.close();
  }
}

async function untilServing(health: HealthClient, signal: AbortSignal): Promise<void> {
  let reason = 'no answer';
  while (!signal.aborted) {
    try {
      const request = { service: 'mimo.inference.v1.InferenceService' };
      const { status } = await callUnary(health, HealthService.check, { signal, request });
      if (status === ServingStatus.SERVING) {
        return;
      }
      reason = 'its health is NOT_SERVING';
    } catch (error) {
      reason = signal.aborted ? reason : ClusterError.from(error).message;
    }
    await pause(pollMs, signal);
  }
  throw new ClusterError('unavailable', `the gateway does not serve: ${reason}`);
}

function nameAndGroups({ name, readyGroups }: Model): string {
  return `${name} (${readyGroups} ready)`;
}

try {
  const { values } = parseArgs({
    options: {
      address: { type: 'string' },
      closed: { type: 'boolean', default: false },
      'timeout-seconds': { type: 'string', default: '60' },
    },
  });
  if (values.address === undefined) {
    throw new ClusterError('invalid_argument', usage);
  }
  const timeout = AbortSignal.timeout(Number(values['timeout-seconds']) * 1_000);
  const apiKey = process.env['MIMO_API_KEY'];
  const said = await check({ address: values.address, apiKey, closed: values.closed }, timeout);
  process.stdout.write(`${said}\n`);
} catch (error) {
  process.stderr.write(`check: ${ClusterError.from(error).message}\n`);
  process.exitCode = 1;
}
