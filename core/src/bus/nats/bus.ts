// The bus on NATS: every port over one link. Records are in a JetStream stream, leases and drain marks in key-value
// buckets, the small messages on core NATS. A process that needs one port, or that keeps more in NATS, uses the link.

import type { Log } from '../../process/log.ts';
import type { Bus } from '../bus.ts';
import type { Heartbeats } from '../signals.ts';
import { NatsDrainMarks } from './drain-marks.ts';
import { NatsLeases } from './leases.ts';
import { NatsLink, type NatsLinkOptions } from './link.ts';
import { Messages } from './messages.ts';
import { NatsRecords } from './records.ts';
import { NatsHeartbeats, NatsQueueStates, NatsSignals } from './signals.ts';
import { NatsStreams, type StreamsOptions } from './streams.ts';

/** What the bus needs: a connection, and how the streams are made. */
export interface NatsBusOptions extends NatsLinkOptions, StreamsOptions {}

/** A bus with its link, for the model catalogue of the same process. */
export interface NatsBus extends Bus {
  readonly link: NatsLink;
}

/** The heartbeats alone over a link, for a process that needs no other port. */
export function createNatsHeartbeats(link: NatsLink, log: Log): Heartbeats {
  return new NatsHeartbeats(new Messages(link, log));
}

/**
 * Opens the bus. Returns at once and connects in the background, retrying forever; until then `connected` is false.
 * Throws `invalid_argument` if the credentials file cannot be read. Close it.
 */
export function createNatsBus(options: NatsBusOptions): NatsBus {
  const { limits, log } = options;
  const link = new NatsLink(options);
  const streams = new NatsStreams(link, options);
  const messages = new Messages(link, log);
  const records = new NatsRecords({ link, streams, limits, log });
  return {
    kind: 'nats',
    link,
    get connected() {
      return streams.ready;
    },
    records,
    leases: new NatsLeases({ link, streams, log }),
    signals: new NatsSignals(messages),
    heartbeats: new NatsHeartbeats(messages),
    queueStates: new NatsQueueStates(messages),
    drainMarks: new NatsDrainMarks({ link, streams, log }),
    opened: async (signal) => void (await streams.opened(signal)),
    close: async () => {
      await link.close();
      await records.ended();
    },
  };
}
