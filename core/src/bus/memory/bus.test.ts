// The promises that it shares with nats/bus.ts are in tests/cluster/queue.test.ts; here is what only it does.

import { describe, expect, it } from 'vitest';

import { RequestRecord } from '@mimo/proto/queue';

import { MemoryBroker } from './broker.ts';
import { createMemoryBus } from './bus.ts';

describe('createMemoryBus', () => {
  it('shows the records of one handle to another of the same broker, and to no other', async () => {
    const broker = new MemoryBroker();
    const [one, two, other] = [createMemoryBus(broker), createMemoryBus(broker), createMemoryBus()];
    const sequence = await one.records.publish(RequestRecord.fromPartial({ requestId: 'r', model: 'm' }));
    expect(await two.records.count()).toBe(1);
    expect(await other.records.count()).toBe(0);
    await one.close();
    expect(await two.records.erase(sequence)).toBe(true);
    await Promise.all([two.close(), other.close()]);
  });

  it('does not deliver a record that was deleted before its turn', async () => {
    const queue = createMemoryBus();
    await queue.records.publish(RequestRecord.fromPartial({ requestId: 'a', model: 'm' }));
    const doomed = await queue.records.publish(RequestRecord.fromPartial({ requestId: 'b', model: 'm' }));
    await queue.records.publish(RequestRecord.fromPartial({ requestId: 'c', model: 'm' }));
    const seen: string[] = [];
    for await (const { record } of queue.records.follow('m', new AbortController().signal)) {
      seen.push(record.requestId);
      await queue.records.erase(doomed);
      if (record.requestId === 'c') {
        break;
      }
    }
    expect(seen).toEqual(['a', 'c']);
    await queue.close();
  });
});
