// The metrics of a real API server: the sum of a metric's series. Knows no metric by name.

import type { ControlPlane } from './control-plane.ts';

/** The sum over the series of that name that carry all of those labels; 0 if there is none. */
export async function readApiserverMetric(
  plane: ControlPlane,
  name: string,
  labels: Readonly<Record<string, string>>,
): Promise<number> {
  const metrics = await plane.kubectl(['get', '--raw', '/metrics']);
  return metrics
    .split('\n')
    .filter((line) => line.startsWith(`${name}{`))
    .filter((line) => Object.entries(labels).every(([label, value]) => line.includes(`${label}="${value}"`)))
    .reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}
