// The metrics of a process and the page that Prometheus reads. Code measures in milliseconds, metrics are in seconds:
// only this file converts. Names are `<process>_<thing>_<unit>`; labels never hold a request id, a key or
// a prompt.
//
// Why four OpenTelemetry packages for one page: API, SDK, resource and exporter are one library in parts. prom-client
// would be one package, with Prometheus as the only reader; here another exporter, such as OTLP, is a reader more and
// no instrument changes.

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';

import { PrometheusExporter } from '@opentelemetry/exporter-prometheus';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { MeterProvider } from '@opentelemetry/sdk-metrics';

import { ClusterError } from './errors.ts';

/** Label names and values. */
export type Labels = Readonly<Record<string, string>>;

/** Makes the instruments of a process. Close it to free the page's port. */
export interface Metrics {
  /** host:port of the page, at /metrics; undefined without a page. */
  readonly address: string | undefined;
  /** A counter; its name ends with `_total`. */
  counter(name: string, description: string): (labels?: Labels, count?: number) => void;
  /** A histogram of durations, given in milliseconds; its name ends with `_seconds`. */
  duration(name: string, description: string): (durationMs: number, labels?: Labels) => void;
  /** A value that is read with the page: one reading per set of labels. */
  gauge(name: string, description: string, read: () => Iterable<readonly [number, Labels]>): void;
  close(): Promise<void>;
}

// From a step of a small model to a request that waits for a cold start, about a factor 2 apart.
const secondsBounds = [
  0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
];

/** Another page beside /metrics, such as /healthz: 200 if healthy, else 503. */
export type StatusPage = () => { readonly ok: boolean; readonly text: string };

/**
 * Starts the metrics of a process; `listenAddress` undefined serves no page. Fails with `unavailable` if the address
 * is in use.
 */
export async function startMetrics(options: {
  readonly process: string;
  readonly listenAddress: string | undefined;
  /** By their paths. */
  readonly pages?: Readonly<Record<string, StatusPage>>;
}): Promise<Metrics> {
  const exporter = new PrometheusExporter({ preventServerStart: true });
  const provider = new MeterProvider({
    resource: resourceFromAttributes({ 'service.name': `mimo-${options.process}` }),
    readers: [exporter],
  });
  const meter = provider.getMeter('mimo');
  const page =
    options.listenAddress === undefined
      ? undefined
      : await servePages(exporter, options.pages ?? {}, options.listenAddress);
  return {
    address: page?.address,
    counter: (name, description) => {
      const counter = meter.createCounter(name, { description });
      return (labels = {}, count = 1) => counter.add(count, labels);
    },
    duration: (name, description) => {
      const histogram = meter.createHistogram(name, {
        description,
        advice: { explicitBucketBoundaries: secondsBounds },
      });
      return (durationMs, labels = {}) => histogram.record(durationMs / 1_000, labels);
    },
    gauge: (name, description, read) => {
      meter.createObservableGauge(name, { description }).addCallback((result) => {
        for (const [value, labels] of read()) {
          result.observe(value, labels);
        }
      });
    },
    close: async () => {
      await page?.close();
      await provider.shutdown();
    },
  };
}

async function servePages(
  exporter: PrometheusExporter,
  pages: Readonly<Record<string, StatusPage>>,
  listenAddress: string,
): Promise<{ address: string; close(): Promise<void> }> {
  const colon = listenAddress.lastIndexOf(':');
  const host = listenAddress.slice(0, colon);
  const server = createServer((request, response) => {
    if (request.url === '/metrics') {
      exporter.getMetricsRequestHandler(request, response);
      return;
    }
    const page = Object.hasOwn(pages, request.url ?? '') ? pages[request.url ?? '']?.() : undefined;
    if (page === undefined) {
      response.writeHead(404).end();
    } else {
      response.writeHead(page.ok ? 200 : 503, { 'content-type': 'text/plain' }).end(`${page.text}\n`);
    }
  });
  const bareHost = host.startsWith('[') ? host.slice(1, -1) : host;
  server.listen({ host: bareHost, port: Number(listenAddress.slice(colon + 1)) });
  try {
    await once(server, 'listening');
  } catch (error) {
    const { message } = ClusterError.from(error);
    throw new ClusterError('unavailable', `cannot listen on ${listenAddress}: ${message}`, { cause: error });
  }
  const { port } = server.address() as AddressInfo;
  return {
    address: `${host}:${port}`,
    close: async () => {
      server.close();
      server.closeAllConnections();
      await once(server, 'close');
    },
  };
}
