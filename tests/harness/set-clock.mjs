// Loaded into a process before all else (`node --import`), this sets a separate wall clock for it and its threads:
// ahead by the milliseconds in the file MIMO_TEST_CLOCK, from the next poll of the file on. Each process writes its
// current offset into a file beside it, named by its id. The monotonic clock and the timers stay, as they do when a
// real clock is set.

import { readFileSync, writeFileSync } from 'node:fs';
import { isMainThread } from 'node:worker_threads';

const file = process.env.MIMO_TEST_CLOCK ?? '';
const lookMs = 20;
const WallDate = Date;
let aheadMs = 0;

function look() {
  const next = Number(readFileSync(file, 'utf8'));
  if (next !== aheadMs) {
    aheadMs = next;
    if (isMainThread) {
      writeFileSync(`${file}.${process.pid}`, String(aheadMs));
    }
  }
}

if (file !== '') {
  look();
  setInterval(look, lookMs).unref();
  const now = () => WallDate.now() + aheadMs;
  globalThis.Date = new Proxy(WallDate, {
    construct: (target, args, newTarget) =>
      Reflect.construct(target, args.length === 0 ? [now()] : args, newTarget),
    apply: () => new WallDate(now()).toString(),
    get: (target, name) => (name === 'now' ? now : Reflect.get(target, name)),
  });
}
