// `npm run e2e:kubernetes [-- SCENARIO... --scale-downs N --rollouts N --faults]`: everything real on this machine,
// from images to uninstall. Prints each step with its time; the last line is JSON.

import { parseArgs } from 'node:util';

import { runEndToEnd, scenarios, type ScenarioName } from './run.ts';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    'scale-downs': { type: 'string', default: '4' },
    rollouts: { type: 'string', default: '2' },
    /** The faults between machines too, which need two of them. */
    faults: { type: 'boolean', default: false },
    /** Leaves a failed cluster as it is until Ctrl-C. */
    hold: { type: 'boolean', default: false },
  },
});
const known = Object.keys(scenarios);
const unknown = positionals.filter((name) => !known.includes(name));
if (unknown.length > 0) {
  console.error(`no scenario ${unknown.join(', ')}: there are ${known.join(', ')}`);
  process.exit(2);
}
const chosen = (
  positionals.length > 0 ? positionals : known.filter((name) => name !== 'faults')
) as ScenarioName[];
const begin = performance.now();
const stopping = new AbortController();
process.once('SIGINT', () => stopping.abort());
process.once('SIGTERM', () => stopping.abort());
const result = await runEndToEnd({
  scenarios: values.faults && !chosen.includes('faults') ? [...chosen, 'faults'] : chosen,
  scaleDowns: Number(values['scale-downs']),
  rollouts: Number(values.rollouts),
  hold: values.hold,
  signal: stopping.signal,
  say: (line) => console.log(`${((performance.now() - begin) / 1000).toFixed(1).padStart(7)} s  ${line}`),
});
const missed = Object.entries(result.scenarios).flatMap(([scenario, figures]) =>
  Object.keys(figures)
    .filter((figure) => figures[figure] === 'MISSED')
    .map((figure) => `${figure} of ${scenario}`),
);
if (missed.length > 0) {
  console.log(`MISSED: ${missed.join(', ')}`);
}
console.log(JSON.stringify(result));
process.exit(result.failed === undefined && missed.length === 0 ? 0 : 1);
