// The picture of docs/lab/gpu.md: tokens a second of the same decoding here and through vLLM, as pairs of bars.
//
//   node tests/bench/gpu-plot.ts FIGURES.jsonl OUT.svg     figures: lines that `bench -- gpu --peer vllm` printed

import { readFileSync, writeFileSync } from 'node:fs';

interface Figure {
  readonly step: string;
  readonly by: 'ours' | 'vllm';
  readonly batch: number;
  readonly contextTokens: number;
  readonly temperature: number;
  readonly drafts: number;
  readonly tokensPerSecond: number;
}

const [figuresFile, outFile] = process.argv.slice(2);
if (figuresFile === undefined || outFile === undefined) {
  process.stderr.write('usage: node tests/bench/gpu-plot.ts FIGURES.jsonl OUT.svg\n');
  process.exit(2);
}
const figures = readFileSync(figuresFile, 'utf8')
  .split('\n')
  .filter((line) => line.startsWith('{'))
  .map((line) => JSON.parse(line) as Figure)
  .filter(({ step }) => step === 'decode');

const colours = { ours: '#d6001c', vllm: '#8a8a8a' } as const;
const rowHeight = 30;
const barHeight = 11;
const left = 150;
const barsWidth = 430;
const titleHeight = 26;

const panels = [
  {
    title: 'greedy, context 512',
    select: ({ temperature, drafts }: Figure) => temperature === 0 && drafts === 0,
  },
  {
    title: 'temperature 0.6, top-p 0.95',
    select: ({ temperature, drafts }: Figure) => temperature > 0 && drafts === 0,
  },
  { title: 'the same with one draft, 0.91 right', select: ({ drafts }: Figure) => drafts === 1 },
];

function bar(figure: Figure | undefined, most: number, y: number): string {
  if (figure === undefined) {
    return '';
  }
  const width = (figure.tokensPerSecond / most) * barsWidth;
  return (
    `<rect x="${left}" y="${y}" width="${width.toFixed(1)}" height="${barHeight}" fill="${colours[figure.by]}"/>` +
    `<text x="${(left + width + 4).toFixed(1)}" y="${y + barHeight - 2}" class="value">` +
    `${Math.round(figure.tokensPerSecond).toLocaleString('en')}</text>`
  );
}

/** A row of the panel: bars as long as the larger of the two. */
function row(ours: Figure, y: number): string {
  const theirs = figures.find(
    (each) =>
      each.by === 'vllm' &&
      each.batch === ours.batch &&
      each.contextTokens === ours.contextTokens &&
      each.temperature === ours.temperature &&
      each.drafts === ours.drafts,
  );
  const most = Math.max(ours.tokensPerSecond, theirs?.tokensPerSecond ?? 0);
  const context = ours.contextTokens === 512 ? '' : ` of ${Math.round(ours.contextTokens / 1000)}k tokens`;
  const ratio = theirs === undefined ? '' : `${(ours.tokensPerSecond / theirs.tokensPerSecond).toFixed(2)} x`;
  return [
    `<text x="${left - 8}" y="${y + 15}" text-anchor="end">${ours.batch}${context}</text>`,
    bar(ours, most, y),
    bar(theirs, most, y + barHeight + 1),
    `<text x="${left + barsWidth + 70}" y="${y + 15}">${ratio}</text>`,
  ].join('');
}

let y = 34;
const parts: string[] = [];
for (const { title, select } of panels) {
  parts.push(`<text x="12" y="${y}" class="title">${title}</text>`);
  y += 10;
  for (const figure of figures.filter((each) => each.by === 'ours' && select(each))) {
    parts.push(row(figure, y));
    y += rowHeight;
  }
  y += titleHeight;
}
const width = left + barsWidth + 140;
writeFileSync(
  outFile,
  `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y - 10}" viewBox="0 0 ${width} ${y - 10}">
<style>text{font:12px sans-serif}.title{font-weight:bold}.value{font-size:10px;fill:#444}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text x="12" y="14">Tokens a second by sequences, one H200: <tspan fill="${colours.ours}">MiMo Cluster</tspan> and
<tspan fill="#666">vLLM 0.26</tspan></text>
${parts.join('\n')}
</svg>
`,
);
