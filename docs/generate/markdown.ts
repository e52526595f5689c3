// Markdown tables for the generated pages. Knows nothing of what is in them.

/** A table whose cells may hold any text. */
export function tableOf(heads: readonly string[], rows: readonly (readonly string[])[]): string {
  return [line(heads), line(heads.map(() => '---')), ...rows.map(line)].join('\n');
}

/** A page that says where it comes from. */
export function pageOf(options: {
  readonly title: string;
  readonly source: string;
  readonly parts: readonly string[];
}): string {
  const note = `<!-- Written by \`npm run generate\` from ${options.source}; do not edit. -->`;
  return [note, `# ${options.title}`, ...options.parts].join('\n\n') + '\n';
}

/** A value as code, or nothing if there is none. */
export function code(text: string | number | boolean | undefined): string {
  return text === undefined || text === '' ? '' : `\`${text}\``;
}

function line(cells: readonly string[]): string {
  return `| ${cells.map(cell).join(' | ')} |`;
}

function cell(text: string): string {
  return text
    .replaceAll('|', String.raw`\|`)
    .replaceAll(/\s*\n\s*/g, ' ')
    .replaceAll('<', '&lt;');
}
