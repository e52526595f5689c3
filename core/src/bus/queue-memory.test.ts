// The promises that it shares with queue-nats are in tests/cluster/queue.test.ts; here is what only it does.

import { describe, expect, it } from 'vitest';

import { RequestRecord } from '@mimo/proto/queue';

import { createMemoryQueue, MemoryBroker } from './queue-memory.ts';

describe('createMemoryQueue', () => {
  it('shows the records of one handle to another of the same broker, and to no other', async () => {
    const broker = new MemoryBroker();
    const [one, two, other] = [createMemoryQueue(broker), createMemoryQueue(broker), createMemoryQueue()];
    const sequence = await one.publish(RequestRecord.fromPartial({ requestId: 'r', model: 'm' }));
    expect(await two.counts()).toEqual({ records: 1 });
    expect(await other.counts()).toEqual({ records: 0 });
    await one.close();
    expect(await two.delete(sequence)).toBe(true);
    await Promise.all([two.close(), other.close()]);
  });

  it('does not give a record that was deleted before its turn', async () => {
    const queue = createMemoryQueue();
    await queue.publish(RequestRecord.fromPartial({ requestId: 'a', model: 'm' }));
    const doomed = await queue.publish(RequestRecord.fromPartial({ requestId: 'b', model: 'm' }));
    await queue.publish(RequestRecord.fromPartial({ requestId: 'c', model: 'm' }));
    const seen: string[] = [];
    for await (const { record } of queue.follow('m', new AbortController().signal)) {
      seen.push(record.requestId);
      await queue.delete(doomed);
      if (record.requestId === 'c') {
        break;
      }
    }
    expect(seen).toEqual(['a', 'c']);
    await queue.close();
  });
});
