// The help of every command of `mimo`, as the command prints it.

import { spawnSync } from 'node:child_process';
import { join } from 'node:path';

import { pageOf } from './markdown.ts';

const commands = ['', 'up', 'chat', 'models', 'compile'];

/** The page of commands. */
export function cliPage(root: string): string {
  const parts = commands.map((command) => {
    const args = [join(root, 'cli/src/main.ts'), ...(command === '' ? [] : [command]), '--help'];
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' });
    if (status !== 0) {
      throw new Error(`mimo ${command} --help exited with ${status}: ${stderr}`);
    }
    const help = `${stdout}${stderr}`.trimEnd();
    return `## mimo ${command}`.trimEnd() + `\n\n\`\`\`text\n${help}\n\`\`\``;
  });
  return pageOf({ title: 'Commands', source: 'each command’s --help', parts });
}
