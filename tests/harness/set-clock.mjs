// Loaded into a process before all else (`node --import`), this gives it, and its threads, a wall clock of its own:
// ahead by the milliseconds that the file MIMO_TEST_CLOCK says, from the next look at the file on. Each process says
// in a file beside it, by its id, what it has taken. The monotonic clock and the timers stay, as they do where a clock
// is set.

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
