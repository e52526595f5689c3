// `npm run bench -- NAME [options]`: runs one benchmark. Each prints its progress and, last, one JSON line.

interface Bench {
  run(args: readonly string[], signal: AbortSignal): Promise<void>;
}

const benches: Readonly<Record<string, () => Promise<Bench>>> = {
  autoscale: () => import('./autoscale.ts'),
  compile: () => import('./compile.ts'),
  engine: () => import('./engine.ts'),
  floods: () => import('./floods.ts'),
  gpu: () => import('./gpu.ts'),
  heldout: () => import('./heldout.ts'),
  informer: () => import('./informer.ts'),
  prefill: () => import('./prefill.ts'),
  prompts: () => import('./prompts.ts'),
  queue: () => import('./queue.ts'),
  records: () => import('./records.ts'),
  reconcile: () => import('./reconcile.ts'),
  sampler: () => import('./sampler.ts'),
  'stalled-readers': () => import('./stalled-readers.ts'),
};

const [name, ...args] = process.argv.slice(2);
const load = benches[name ?? ''];
if (load === undefined) {
  console.error(`give a benchmark: ${Object.keys(benches).join(', ')}`);
  process.exit(2);
}
const stopping = new AbortController();
process.once('SIGINT', () => stopping.abort());
process.once('SIGTERM', () => stopping.abort());
await (await load()).run(args, stopping.signal);
