// The Pareto picture: a panel for each trace and start-up delay, cost against attainment, as SVG text. Knows no rules.

import type { RunResult } from './cluster.ts';

/** One arm on one trace with one start-up delay. */
export interface ArmResult extends RunResult {
  readonly trace: string;
  readonly startUpSeconds: number;
  readonly arm: string;
  /** Replica seconds over the oracle's. */
  readonly costRatio: number;
  /** Arms (those with hindsight aside) with at least the attainment for at most the cost, and one of the two better. */
  readonly dominatedBy: readonly string[];
  readonly reversalsPer10Minutes: number;
}

const colours: Readonly<Record<string, string>> = {
  ours: '#d6001c',
  oracle: '#111111',
  'best constant': '#555555',
  'static peak': '#b0b0b0',
  'plain token rule': '#e08214',
  'HPA on CPU': '#1f77b4',
  'Knative KPA': '#2ca02c',
  'KEDA + HPA': '#9467bd',
  'KubeAI average': '#17a2b8',
  '±1 rule': '#8c564b',
};

const panelWidth = 300;
const panelHeight = 190;
const margin = { left: 90, top: 96, gapX: 64, gapY: 62 };
const costMax = 4;
/** So that a full hundred does not sit on the edge. */
const topPadding = 12;

function escapeText(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}

/** Costs from the oracle's half to four times, in logarithm; what is dearer sits on the edge. */
function xOf(costRatio: number): number {
  const bounded = Math.min(costMax, Math.max(0.5, costRatio));
  return (Math.log2(bounded / 0.5) / Math.log2(costMax / 0.5)) * panelWidth;
}

function yOf(attainmentRatio: number): number {
  return topPadding + (panelHeight - topPadding) * (1 - attainmentRatio);
}

function panelOf(results: readonly ArmResult[], left: number, top: number): string {
  const parts = [
    `<g transform="translate(${left},${top})">`,
    `<rect width="${panelWidth}" height="${panelHeight}" fill="#fff" stroke="#999"/>`,
  ];
  for (const cost of [0.5, 1, 1.5, 2, 3, 4]) {
    const label = cost === costMax ? '≥4×' : `${cost}×`;
    parts.push(
      `<path d="M${xOf(cost)} 0V${panelHeight}" stroke="${cost === 1 ? '#888' : '#e6e6e6'}"/>`,
      `<text x="${xOf(cost)}" y="${panelHeight + 14}" text-anchor="middle" class="tick">${label}</text>`,
    );
  }
  for (const attained of [0, 0.25, 0.5, 0.75, 0.9, 1]) {
    parts.push(
      `<path d="M0 ${yOf(attained)}H${panelWidth}" stroke="#e6e6e6"/>`,
      `<text x="-6" y="${yOf(attained) + 4}" text-anchor="end" class="tick">${attained * 100} %</text>`,
    );
  }
  // Ours last, so that nothing covers it.
  for (const result of results.toSorted((a, b) => Number(a.arm === 'ours') - Number(b.arm === 'ours'))) {
    const [x, y] = [xOf(result.costRatio), yOf(result.attainmentRatio)];
    const colour = colours[result.arm] ?? '#000';
    const title = `${result.arm}: ${(result.attainmentRatio * 100).toFixed(1)} % at ${result.costRatio.toFixed(2)}×, lost ${result.lost}`;
    const shape =
      result.arm === 'oracle'
        ? `<path d="M${x} ${y - 7}L${x + 6} ${y + 5}H${x - 6}Z" fill="${colour}">`
        : `<circle cx="${x}" cy="${y}" r="${result.arm === 'ours' ? 7 : 5}" fill="${colour}" fill-opacity="0.85" stroke="#fff">`;
    parts.push(
      `${shape}<title>${escapeText(title)}</title>${result.arm === 'oracle' ? '</path>' : '</circle>'}`,
    );
  }
  parts.push('</g>');
  return parts.join('\n');
}

/** Draws all panels: a row a trace, a column a start-up delay. */
export function plotPareto(results: readonly ArmResult[], targetWaitMs: number): string {
  const traces = [...new Set(results.map(({ trace }) => trace))];
  const delays = [...new Set(results.map(({ startUpSeconds }) => startUpSeconds))];
  const width = margin.left + delays.length * (panelWidth + margin.gapX) + 10;
  const height = margin.top + traces.length * (panelHeight + margin.gapY);
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="Helvetica, Arial, sans-serif">`,
    '<style>text{font-size:13px;fill:#222}.tick{font-size:10px;fill:#555}.head{font-size:17px;font-weight:bold}</style>',
    `<rect width="${width}" height="${height}" fill="#fafafa"/>`,
    `<text x="${margin.left}" y="26" class="head">Requests begun within ${targetWaitMs / 1000} s against replica-seconds (of the oracle's): up and left is better</text>`,
  ];
  Object.entries(colours).forEach(([arm, colour], index) => {
    const x = margin.left + (index % 5) * 190;
    const y = 48 + Math.floor(index / 5) * 18;
    parts.push(
      `<circle cx="${x}" cy="${y - 4}" r="5" fill="${colour}"/><text x="${x + 10}" y="${y}">${escapeText(arm)}</text>`,
    );
  });
  traces.forEach((trace, row) => {
    delays.forEach((delay, column) => {
      const left = margin.left + column * (panelWidth + margin.gapX);
      const top = margin.top + 10 + row * (panelHeight + margin.gapY);
      const panel = results.filter((result) => result.trace === trace && result.startUpSeconds === delay);
      parts.push(
        `<text x="${left}" y="${top - 8}">${escapeText(trace)}, groups start in ${delay} s</text>`,
        panelOf(panel, left, top),
      );
    });
  });
  return `${parts.join('\n')}\n</svg>\n`;
}
