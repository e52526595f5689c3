// The bus in the memory of one process, with the semantics of nats/bus.ts except durability: for machines without a
// nats-server, and as the fast half of the shared test suite. Buses of one broker see each other.

import { ClusterError } from '../../process/errors.ts';
import type { Bus } from '../bus.ts';
import { assertOpen, MemoryBroker, type MemoryHandle } from './broker.ts';
import { MemoryDrainMarks } from './drain-marks.ts';
import { MemoryLeases } from './leases.ts';
import { MemoryRecords } from './records.ts';
import { MemoryHeartbeats, MemoryQueueStates, MemorySignals } from './signals.ts';

/** Opens a bus on a broker, by default on a new one. Close it to end its iterations and give up its leases. */
export function createMemoryBus(broker: MemoryBroker = new MemoryBroker()): Bus {
  const closing = new AbortController();
  const handle: MemoryHandle = { broker, closing: closing.signal };
  const leases = new MemoryLeases(handle);
  return {
    kind: 'memory',
    get connected() {
      return !closing.signal.aborted;
    },
    records: new MemoryRecords(handle),
    leases,
    signals: new MemorySignals(handle),
    heartbeats: new MemoryHeartbeats(handle),
    queueStates: new MemoryQueueStates(handle),
    drainMarks: new MemoryDrainMarks(handle),
    opened: async () => assertOpen(handle),
    close: async () => {
      closing.abort(new ClusterError('canceled', 'the queue is closed'));
      await leases.releaseAll();
    },
  };
}
