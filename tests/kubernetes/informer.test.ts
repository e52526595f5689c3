// Informers against a real API server that is restarted, behind a network that refuses, cuts and goes silent:
// afterwards they hold the server's objects, and no listener has missed a change.

import { setTimeout as sleep } from 'node:timers/promises';

import { KubeClient } from '@mimo/controller/kube/client';
import { startInformer, type Informer, type InformerTiming } from '@mimo/controller/kube/informer';
import { keyOf, type KubeObject } from '@mimo/controller/kube/resource';
import { createLog } from '@mimo/core/process/log';
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest';

import { readApiserverMetric } from '../harness/kubernetes/apiserver-metrics.ts';
import {
  configMap,
  configMaps,
  createNamespace,
  kubeConfigVia,
  type ConfigMap,
} from '../harness/kubernetes/config-maps.ts';
import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { startFaultProxy, type FaultProxy } from '../harness/kubernetes/fault-proxy.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';

const log = createLog({ process: 'test', level: 'silent' });
const soon = (): AbortSignal => AbortSignal.timeout(60_000);
/** A watch or an answer that is late is none that is lost: processes may be stopped for seconds. */
const quick: InformerTiming = { watchSeconds: 2, graceMs: 20_000, retryMinMs: 50, retryMaxMs: 1_000 };
const patientMs = 20_000;
/** Where a silence has to be noticed. */
const impatient: Partial<InformerTiming> = { graceMs: 500 };
const impatientMs = 2_000;

let plane: ControlPlane;

beforeAll(async () => {
  plane = await startControlPlane({ tools: await findTools() });
});
afterAll(async () => plane.close());

/** Watches of ConfigMaps that the API server serves now. */
async function readWatches(): Promise<number> {
  const labels = { verb: 'WATCH', resource: 'configmaps', scope: 'namespace' };
  return readApiserverMetric(plane, 'apiserver_longrunning_requests', labels);
}

interface Followed {
  readonly proxy: FaultProxy;
  /** Behind the proxy. */
  readonly informer: Informer<ConfigMap>;
  /** Not behind it. */
  readonly client: KubeClient;
  /** What a follower of the informer's notes knows: the version of each key. */
  readonly noted: Map<string, string>;
  /** Whether the informer and its follower know exactly what the API server has. */
  readonly agrees: () => Promise<boolean>;
}

async function follow(
  namespace: string,
  options: {
    readonly timing?: Partial<InformerTiming>;
    readonly labelSelector?: string;
    readonly timeoutMs?: number;
  } = {},
): Promise<Followed> {
  const { timing, timeoutMs = patientMs, ...selection } = options;
  const proxy = await startFaultProxy(plane.url);
  const client = await createNamespace(plane.kubeconfig, namespace);
  const proxied = new KubeClient(kubeConfigVia(plane.kubeconfig, proxy.url), { namespace, timeoutMs });
  const informer = startInformer<ConfigMap>({
    client: proxied,
    type: configMaps,
    selection,
    parse: (object): ConfigMap => object,
    index: ({ metadata }) => metadata.labels?.['parity'],
    log,
    timing: { ...quick, ...timing },
  });
  onTestFinished(async () => {
    await informer.close();
    proxied.close();
    client.close();
    await proxy.close();
  });
  const noted = new Map<string, string>();
  informer.onChange((key) => {
    const object = informer.get(key);
    if (object === undefined) {
      noted.delete(key);
    } else {
      noted.set(key, object.metadata.resourceVersion);
    }
  });
  const agrees = async (): Promise<boolean> => {
    const { items } = await client.list(configMaps, selection, soon());
    const fresh = versions(items);
    return fresh === versions(informer.list()) && fresh === [...noted].map(String).toSorted().join(' ');
  };
  return { proxy, informer, client, noted, agrees };
}

function versions(objects: Iterable<KubeObject>): string {
  return Array.from(objects, (object) => String([keyOf(object), object.metadata.resourceVersion]))
    .toSorted()
    .join(' ');
}

/** Creates, changes and deletes at random until the signal fires, telling each write. */
async function writeAtRandom(client: KubeClient, onWrite: () => void, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const name = `object-${Math.floor(Math.random() * 60)}`;
    const draw = Math.random();
    try {
      if (draw < 0.4) {
        const labels = { parity: draw < 0.2 ? 'even' : 'odd' };
        await client.create(configMaps, configMap(name, {}, { labels }), soon());
      } else if (draw < 0.7) {
        await client.patch(configMaps, name, { data: { draw: String(draw) } }, {}, soon());
      } else {
        await client.delete(configMaps, name, {}, soon());
      }
      onWrite();
    } catch {
      // The name is taken or missing, or the API server is away: another draw.
      await sleep(5);
    }
  }
}

describe('an informer', () => {
  it('fills, then reports each added, changed and deleted object by its key, with an index', async () => {
    const { informer, client } = await follow('plain', { labelSelector: 'parity' });
    await informer.whenSynced(soon());
    const told: string[] = [];
    informer.onChange((key) => told.push(key));
    await client.create(configMaps, configMap('a', {}, { labels: { parity: 'odd' } }), soon());
    await waitFor('its appearance', () => told.length === 1);
    expect(informer.indexed('odd').map(keyOf)).toEqual(['plain/a']);
    await client.patch(configMaps, 'a', { metadata: { labels: { parity: 'even' } } }, {}, soon());
    await waitFor('its change', () => told.length === 2);
    expect(informer.indexed('odd')).toEqual([]);
    expect(informer.indexed('even').map(keyOf)).toEqual(['plain/a']);
    expect(informer.get('plain/a')).not.toHaveProperty('metadata.managedFields');
    await client.delete(configMaps, 'a', {}, soon());
    await waitFor('its end', () => told.length === 3);
    expect(told).toEqual(['plain/a', 'plain/a', 'plain/a']);
    expect(informer.get('plain/a')).toBeUndefined();
    expect(informer.indexed('even')).toEqual([]);
    expect(informer.counts).toMatchObject({ lists: 1, events: 3, failures: 0 });
  });

  it('reports an object that leaves its selector as deleted', async () => {
    const { informer, client, agrees } = await follow('selected', { labelSelector: 'wanted=yes' });
    await client.create(configMaps, configMap('a', {}, { labels: { wanted: 'yes' } }), soon());
    await client.create(configMaps, configMap('b', {}, { labels: { wanted: 'no' } }), soon());
    await waitFor('the wanted one', () => informer.get('selected/a') !== undefined);
    expect(informer.get('selected/b')).toBeUndefined();
    await client.patch(configMaps, 'a', { metadata: { labels: { wanted: 'no' } } }, {}, soon());
    await waitFor('its end', () => informer.get('selected/a') === undefined);
    await waitFor('agreement with a fresh list', agrees);
  });

  it('keeps the last version of an unreadable object, and a throwing listener stops no other', async () => {
    const client = await createNamespace(plane.kubeconfig, 'unreadable');
    const informer = startInformer({
      client,
      type: configMaps,
      parse: (object) => {
        const { data = {}, metadata } = object as ConfigMap;
        if (data['wrong'] !== undefined) {
          throw new Error('wrong');
        }
        return { name: metadata.name, data };
      },
      log,
      timing: quick,
    });
    onTestFinished(async () => {
      await informer.close();
      client.close();
    });
    const told: string[] = [];
    informer.onChange(() => {
      throw new Error('a listener');
    });
    informer.onChange((key) => told.push(key));
    await client.create(configMaps, configMap('a', { text: 'right' }), soon());
    await waitFor('the object', () => told.includes('unreadable/a'));
    await client.patch(configMaps, 'a', { data: { wrong: 'yes' } }, {}, soon());
    await client.create(configMaps, configMap('b'), soon());
    await waitFor('what comes after', () => told.includes('unreadable/b'));
    expect(informer.get('unreadable/a')).toMatchObject({ data: { text: 'right' } });
    expect(told.filter((key) => key === 'unreadable/a')).toHaveLength(1);
  });

  it('continues from watch to watch without listing again, and ages only while the server is silent', async () => {
    const { informer, client } = await follow('quiet', { timing: { watchSeconds: 1 } });
    await client.create(configMaps, configMap('a'), soon());
    await waitFor('four watches', () => informer.counts.watches >= 4);
    expect(informer.counts).toMatchObject({ lists: 1, failures: 0 });
    // The object came before them, longer ago.
    await waitFor('a young age', () => informer.lastEventAgeMs < 3_000);
  });

  it('has one connection to watch and at most one kept for requests, and none after it is closed', async () => {
    const othersBefore = await readWatches();
    const { informer, proxy, client } = await follow('connections');
    await informer.whenSynced(soon());
    for (let round = 0; round < 5; round += 1) {
      proxy.cut();
      await client.create(configMaps, configMap(`a-${round}`), soon());
      await waitFor('the object', () => informer.get(`connections/a-${round}`) !== undefined);
      expect(proxy.openConnections).toBeLessThanOrEqual(2);
    }
    await waitFor(
      'the end of the watches that were cut',
      async () => (await readWatches()) === othersBefore + 1,
    );
    await informer.close();
    await waitFor('the end of the watch', async () => (await readWatches()) === othersBefore);
    expect(proxy.openConnections).toBeLessThanOrEqual(1);
    await expect(informer.whenSynced(soon())).resolves.toBeUndefined();
  });

  it('resumes after a cut connection with one more watch and no list', async () => {
    const { informer, proxy, client, agrees } = await follow('cut');
    await informer.whenSynced(soon());
    await waitFor('the watch', () => informer.counts.watches >= 1);
    proxy.cut();
    await client.create(configMaps, configMap('a'), soon());
    await waitFor('the object', () => informer.get('cut/a') !== undefined);
    expect(informer.counts.lists).toBe(1);
    await waitFor('agreement with a fresh list', agrees);
  });

  it('ends a silent watch in time, and catches up on the changes that it missed', async () => {
    const { informer, proxy, client, agrees } = await follow('silent', {
      timing: impatient,
      timeoutMs: impatientMs,
    });
    // What is created after the list comes by the watch, so the watch stands.
    await informer.whenSynced(soon());
    await client.create(configMaps, configMap('gone'), soon());
    await waitFor('the first', () => informer.get('silent/gone') !== undefined);
    proxy.silence();
    const { failures } = informer.counts;
    await client.delete(configMaps, 'gone', {}, soon());
    await client.create(configMaps, configMap('came'), soon());
    await waitFor('the second', () => informer.get('silent/came') !== undefined);
    expect(informer.get('silent/gone')).toBeUndefined();
    // It was heard of by no event and no end of the silent watch, but after that was cut.
    expect(informer.counts.failures).toBeGreaterThan(failures);
    expect(informer.counts.lists).toBe(1);
    await waitFor('agreement with a fresh list', agrees);
  });

  it('keeps its cache while the API server cannot be reached, reports its age, and backs off', async () => {
    const { informer, proxy, client } = await follow('away');
    await client.create(configMaps, configMap('a'), soon());
    await waitFor('the object', () => informer.get('away/a') !== undefined);
    proxy.mode = 'refuse';
    proxy.cut();
    const cutMs = performance.now();
    await sleep(4_000);
    await waitFor('several tries', () => informer.counts.failures > 4);
    expect(informer.synced).toBe(true);
    expect(informer.get('away/a')).toBeDefined();
    expect(informer.lastEventAgeMs).toBeGreaterThan(3_000);
    // 50, 100, 200 ... 1,000 ms, each up to half less: in four seconds at most a dozen, then two a second.
    expect(informer.counts.failures).toBeLessThan(7 + (performance.now() - cutMs) / 500);
    proxy.mode = 'pass';
    await waitFor('its return', () => informer.lastEventAgeMs < 500);
  });

  it('lists again when its version is too old (410), and finds the deletions that it missed', async () => {
    const { informer, proxy, client, agrees } = await follow('expired', { timeoutMs: 60_000 });
    await client.create(configMaps, configMap('kept'), soon());
    await client.create(configMaps, configMap('deleted'), soon());
    await waitFor('both', () => informer.get('expired/deleted') !== undefined);
    // Between watches, as after a failure: the next one goes on from a version that the server has no more.
    proxy.mode = 'silent';
    proxy.cut();
    await client.delete(configMaps, 'deleted', {}, soon());
    await client.patch(configMaps, 'kept', { data: { changed: 'yes' } }, {}, soon());
    await plane.stopApiserver('SIGKILL');
    await plane.startApiserver();
    expect(informer.counts.lists).toBe(1);
    proxy.mode = 'pass';
    proxy.cut();
    await waitFor('the deletion', () => informer.get('expired/deleted') === undefined);
    expect(informer.get('expired/kept')?.data).toEqual({ changed: 'yes' });
    expect(informer.counts.lists).toBe(2);
    await waitFor('agreement with a fresh list', agrees);
  });

  it('misses none of hundreds of writes while connections break at random and the API server restarts', async () => {
    const { informer, proxy, client, agrees } = await follow('chaos', {
      timing: impatient,
      timeoutMs: impatientMs,
    });
    await informer.whenSynced(soon());
    const ending = new AbortController();
    let writes = 0;
    const write = (): void => {
      writes += 1;
    };
    const writing = Promise.all([1, 2].map(async () => writeAtRandom(client, write, ending.signal)));
    const faults: readonly (() => unknown)[] = [
      () => proxy.cut(),
      () => proxy.silence(),
      () => proxy.cutAfterBytes(20_000),
      () => {
        proxy.mode = 'refuse';
      },
      () => {
        proxy.mode = 'silent';
        proxy.cut();
      },
    ];
    const breakAtRandom = async (): Promise<void> => {
      while (!ending.signal.aborted) {
        faults[Math.floor(Math.random() * faults.length)]?.();
        await sleep(100 + Math.random() * 600);
        proxy.mode = 'pass';
        proxy.cutAfterBytes(undefined);
        await sleep(Math.random() * 600);
      }
    };
    const breaking = breakAtRandom();
    await waitFor('writes before the restart', () => writes > 150, 60_000);
    await plane.stopApiserver('SIGTERM');
    await plane.startApiserver();
    await waitFor('writes after the restart', () => writes > 400, 60_000);
    await sleep(2_000);
    ending.abort();
    await Promise.all([writing, breaking]);
    await waitFor('agreement with a fresh list', agrees);
    console.log(`${writes} writes, ${JSON.stringify(informer.counts)}`);
    // And it goes on.
    await client.create(configMaps, configMap('after'), soon());
    await waitFor('the object', () => informer.get('chaos/after') !== undefined);
    expect(await agrees()).toBe(true);
  });
});
