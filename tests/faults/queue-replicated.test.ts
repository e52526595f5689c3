// The queue on three real nats-servers, one with a full disk: the others keep storing, whether it led the stream or
// followed, and it recovers once it is restarted with room, as the chart's liveness probe does.

import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { jetstream, type JetStreamManager } from '@nats-io/jetstream';
import { connect } from '@nats-io/transport-node';

import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import type { RecordPlace } from '@mimo/core/bus/records';
import { createLog } from '@mimo/core/process/log';
import { RequestRecord } from '@mimo/proto/queue';
import { afterEach, beforeEach, expect, it } from 'vitest';

import { freePorts } from '../../cli/src/local/free-ports.ts';
import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startTestNats } from '../harness/nats.ts';
import { mountSmall, type SmallVolume } from '../harness/small-volume.ts';
import { waitFor } from '../harness/wait-for.ts';

interface Member {
  readonly name: string;
  readonly volume: SmallVolume;
  readonly storeDirectory: string;
  readonly configFile: string;
  readonly healthUrl: string;
  server: NatsServer;
}

let directory: string;
let closes: (() => Promise<unknown> | void)[] = [];

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-queue-replicated-'));
});

afterEach(async () => {
  for (const close of closes.toReversed()) {
    await close();
  }
  closes = [];
  await rm(directory, { recursive: true, force: true });
});

/** Three servers with a small volume each; undefined without the right to mount. */
async function startMembers(): Promise<readonly Member[] | undefined> {
  const ports = await freePorts(6);
  const routes = ports.slice(0, 3).map((port) => `"nats://127.0.0.1:${port}"`);
  const members: Promise<Member>[] = [];
  for (const [index, port] of ports.slice(0, 3).entries()) {
    const name = `n${index}`;
    const healthPort = ports[3 + index];
    const volume = await mountSmall(join(directory, name));
    if (volume === undefined) {
      return undefined;
    }
    closes.push(volume.unmount);
    const configFile = join(directory, `${name}.conf`);
    const cluster = `cluster { name: "c", listen: "127.0.0.1:${port}", routes: [${routes.join(', ')}] }`;
    await writeFile(configFile, `server_name: "${name}"\nhttp: "127.0.0.1:${healthPort}"\n${cluster}\n`);
    const storeDirectory = join(volume.path, 'nats');
    const healthUrl = `http://127.0.0.1:${healthPort}/healthz?js-enabled-only=true`;
    const started = startTestNats({ storeDirectory, port: 0, configFile });
    members.push(started.then((server) => ({ name, volume, storeDirectory, configFile, healthUrl, server })));
  }
  const all = await Promise.all(members);
  closes.push(() => Promise.all(all.map(({ server }) => server.close())));
  return all;
}

async function openManager(members: readonly Member[]): Promise<JetStreamManager> {
  const connection = await connect({
    servers: members.map(({ server }) => server.url),
    maxReconnectAttempts: -1,
  });
  closes.push(() => connection.close());
  return jetstream(connection).jetstreamManager();
}

/** Records a request, as often as that takes. */
async function record(bus: Bus, requestId: string): Promise<RecordPlace> {
  const promptTokenIds = Array.from({ length: 1_900 }, () => 140_000);
  const request = RequestRecord.fromPartial({ requestId, model: 'm', gatewayId: 'g', promptTokenIds });
  let place: RecordPlace | undefined;
  await waitFor('the record to be stored', async () => {
    place = await bus.records.publish(request).catch(() => undefined);
    return place !== undefined;
  });
  return place as RecordPlace;
}

it.for(['leads', 'follows'])(
  'keeps storing while the disk of a server that %s is full',
  async (role, context) => {
    const members = await startMembers();
    if (members === undefined) {
      context.skip('needs the right to mount a small filesystem');
      return;
    }
    const bus = createNatsBus({
      servers: members.map(({ server }) => server.url),
      clientName: 'test',
      replicas: 3,
      recordMaxAgeMs: 3_600_000,
      log: createLog({ process: 'test', level: 'silent' }),
    });
    closes.push(() => bus.close());
    await bus.opened(AbortSignal.timeout(120_000));
    const manager = await openManager(members);
    const places = [await record(bus, 'first')];
    const { cluster } = await manager.streams.info('REQUESTS');
    const full = members.find(({ name }) => (name === cluster?.leader) === (role === 'leads')) as Member;

    await writeFile(full.volume.ballast, Buffer.alloc(32 * 2 ** 20)).catch(() => undefined);
    const isHealthy = async (): Promise<boolean> => (await fetch(full.healthUrl)).ok;
    await waitFor('the full server to say so', async () => {
      places.push(await record(bus, `r${places.length}`));
      return !(await isHealthy());
    });
    for (let more = 0; more < 20; more += 1) {
      places.push(await record(bus, `r${places.length}`));
    }
    expect(places.map(({ sequence }) => sequence)).toEqual(
      places.map(({ sequence }) => sequence).toSorted((one, other) => one - other),
    );

    await rm(full.volume.ballast);
    const { port } = full.server;
    full.server.child.kill();
    await full.server.child.exited;
    full.server = await startTestNats({ ...full, port });
    await waitFor('the server to be whole again', async () => {
      const info = await manager.streams.info('REQUESTS').catch(() => undefined);
      const replicas = info?.cluster?.replicas ?? [];
      return (
        (await isHealthy().catch(() => false)) &&
        replicas.length === 2 &&
        replicas.every(({ current, offline }) => current && !(offline ?? false))
      );
    });
    expect(await bus.records.count()).toBe(places.length);
    expect(await Promise.all(places.map((place) => bus.records.erase(place)))).not.toContain(false);
    expect(await bus.records.count()).toBe(0);
  },
);
