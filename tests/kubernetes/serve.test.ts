// The life of one ModelService in a real cluster: installed from the chart, scaled up from zero, scaled up by a burst,
// back to zero, uninstalled. `npm run e2e:kubernetes` runs it with everything else that needs a real kubelet.

import { expect, it } from 'vitest';

import { runEndToEnd } from '../e2e/run.ts';

it('serves from zero, scales in one decision, loses no request and leaves nothing behind', async () => {
  const result = await runEndToEnd({
    scenarios: ['serve'],
    scaleDowns: 0,
    rollouts: 0,
    hold: false,
    signal: new AbortController().signal,
    say: (line) => console.error(line),
  });
  expect(result.failed).toBeUndefined();
  expect(result.scenarios['serve']).toMatchObject({ requestsLost: 0, groupsWanted: 3 });
}, 1_200_000);
