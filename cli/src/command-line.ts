// How users call these commands: through npm in a checkout, where they run as TypeScript, and by name where the
// npm package is installed.

const isCheckout = import.meta.filename.endsWith('.ts');

/** The line that runs a command: `npm run chat -- "hi"` or `mimo chat "hi"`. */
export function commandLine(name: 'up' | 'chat', args = ''): string {
  const separator = args === '' ? '' : ' -- ';
  return isCheckout ? `npm run ${name}${separator}${args}` : `mimo ${name} ${args}`.trimEnd();
}
