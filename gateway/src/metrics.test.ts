import { startMetrics } from '@mimo/core/process/metrics';
import { queueStateFreshMs } from '@mimo/core/bus/signals';
import { expect, it } from 'vitest';

import { observeQueues, type ReceivedState } from './metrics.ts';

function stateOf(model: string, ageMs: number): ReceivedState {
  const state = {
    model,
    dispatcherEpoch: 1,
    waitingRequests: 3,
    runningRequests: 2,
    parkedRequests: 0,
    waitingTokens: 300,
    inFlightTokens: 200,
    oldestWaitingMs: 1_500,
    readyGroups: 1,
    slots: 16,
    arrivedTokens: 500,
    endedTokens: 0,
    waitingFor: [],
    groups: [],
  };
  return { state, receivedMs: performance.now() - ageMs };
}

it('shows the queues of models whose dispatcher publishes, and no value for the others', async () => {
  const metrics = await startMetrics({ process: 'gateway', listenAddress: '127.0.0.1:0' });
  try {
    observeQueues(metrics, () => [stateOf('heard', 0), stateOf('silent', queueStateFreshMs + 1)]);
    const page = await (await fetch(`http://${metrics.address}/metrics`)).text();
    const samples = page.split('\n').filter((line) => line.startsWith('queue_'));
    const values = samples.map((line) => {
      const [, name, state, value] = /^(\w+)\{(?:.*state="(\w+)")?.*\} (\S+)/.exec(line) ?? [];
      return [name, state, Number(value)];
    });
    expect(samples.filter((line) => !line.includes('model="heard"'))).toEqual([]);
    expect(values).toEqual([
      ['queue_depth_requests', 'waiting', 3],
      ['queue_depth_requests', 'running', 2],
      ['queue_depth_requests', 'parked', 0],
      ['queue_backlog_tokens', 'waiting', 300],
      ['queue_backlog_tokens', 'running', 200],
      ['queue_oldest_waiting_seconds', undefined, 1.5],
      ['queue_ready_groups', undefined, 1],
    ]);
  } finally {
    await metrics.close();
  }
});
