// Markdown of the generated pages: tables, and prose in lines of the length that all pages have. Knows nothing of
// their content.

/** As many characters as a line may have, up to a space. */
const breakable = /(?=.{121})(.{1,120})\s+/g;

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
  return [note, `# ${options.title}`, ...options.parts.map(wrapped)].join('\n\n') + '\n';
}

/** A value as code, or nothing if there is none. */
export function code(text: string | number | boolean | undefined): string {
  return text === undefined || text === '' ? '' : `\`${text}\``;
}

/** Breaks lines of prose; tables and headings stay whole. */
function wrapped(part: string): string {
  return part
    .split('\n')
    .map((text) => (/^[|#]/.test(text) ? text : text.replaceAll(breakable, '$1\n')))
    .join('\n');
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
