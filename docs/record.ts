// The terminal recording of the README: runs `npm run up` and `npm run chat` for real and writes what they printed, at
// the pace at which it came, as an animated SVG. `node docs/record.ts` writes docs/recording.svg; a cold start is cut
// short.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

const root = join(import.meta.dirname, '..');
const port = '50051';
const questions = ['What is 47 + 85?', 'Sort 9, 3, 7, 1.'];
const columns = 92;
const lineHeight = 20;
const charWidth = 8.4;
const margin = 16;
const escapeCode = '\u001b';
/** A pause of the recording is never longer. */
const maxGapMs = 1_200;
const typingMs = 45;

/** Text that appears at a time, where the one before it ended. */
interface Chunk {
  readonly atMs: number;
  readonly text: string;
  readonly style: 'plain' | 'dim' | 'typed';
}

const chunks: Chunk[] = [];
let clockMs = 300;

function typed(command: string): void {
  chunks.push({ atMs: clockMs, text: '$ ', style: 'dim' });
  for (const letter of command) {
    clockMs += typingMs;
    chunks.push({ atMs: clockMs, text: letter, style: 'typed' });
  }
  clockMs += 400;
  chunks.push({ atMs: clockMs, text: '\n', style: 'plain' });
}

/** Runs a command and records its output until it exits, or until it has printed `until`. */
async function record(args: readonly string[], until?: string): Promise<() => Promise<void>> {
  const child = spawn(process.execPath, [join(root, 'cli/src/main.ts'), ...args], {
    cwd: root,
    env: { ...process.env, FORCE_COLOR: '1' },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let lastMs = performance.now();
  let seen = '';
  let isDim = false;
  const { promise, resolve } = Promise.withResolvers<void>();
  const take =
    (style: Chunk['style']) =>
    (data: Buffer): void => {
      const nowMs = performance.now();
      clockMs += Math.min(nowMs - lastMs, maxGapMs);
      lastMs = nowMs;
      const text = data.toString().replaceAll(homedir(), '~');
      seen += text;
      // The commands dim what is not the answer: escape code 2 switches it on, 22 off.
      for (const [index, part] of text.split(escapeCode).entries()) {
        const [, code, shown = part] = (index === 0 ? null : /^\[(\d+)m(.*)$/s.exec(part)) ?? [];
        isDim = code === undefined ? isDim : code === '2';
        chunks.push({ atMs: clockMs, text: shown, style: isDim ? 'dim' : style });
      }
      if (until !== undefined && seen.includes(until)) {
        resolve();
      }
    };
  child.stdout.on('data', take('plain'));
  child.stderr.on('data', take('dim'));
  child.once('exit', () => resolve());
  await promise;
  return async () => {
    const exited = once(child, 'exit');
    child.kill('SIGINT');
    await exited;
  };
}

function escape(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}

/** Places the chunks on lines; a line break inside a chunk begins the next line. */
function draw(): string {
  const pieces: string[] = [];
  let [line, column] = [0, 0];
  for (const { atMs, text, style } of chunks) {
    for (const [index, part] of text.split('\n').entries()) {
      if (index > 0) {
        [line, column] = [line + 1, 0];
      }
      const shown = part.slice(0, columns - column);
      if (shown.trim() !== '') {
        const x = margin + column * charWidth;
        const y = margin + (line + 1) * lineHeight;
        const delay = `animation-delay:${Math.round(atMs)}ms`;
        pieces.push(
          `<text x="${x.toFixed(1)}" y="${y}" class="${style}" style="${delay}">${escape(shown)}</text>`,
        );
      }
      column += shown.length;
    }
  }
  const width = Math.ceil(2 * margin + columns * charWidth);
  const height = 2 * margin + (line + 1) * lineHeight;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" xml:space="preserve">
<!-- Written by docs/record.ts from what the commands printed. -->
<style>
text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; animation: appear 1ms steps(1) both; }
.plain, .typed { fill: #e6e6e6; } .dim { fill: #9aa5b1; }
@keyframes appear { from { opacity: 0; } to { opacity: 1; } }
</style>
<rect width="100%" height="100%" rx="8" fill="#1b1f27"/>
${pieces.join('\n')}
</svg>
`;
}

typed('npm run up');
const stop = await record(['up', '--port', port], 'Ctrl-C stops everything');
chunks.push({ atMs: clockMs, text: '\n\n', style: 'plain' });
for (const question of questions) {
  typed(`npm run chat -- "${question}"`);
  await record(['chat', question]);
  chunks.push({ atMs: clockMs, text: '\n', style: 'plain' });
}
writeFileSync(join(root, 'docs/recording.svg'), draw());
await stop();
