// `mimo models`: what the gateway serves, one model a line.

import { parseArgs } from 'node:util';

import { Connection, defaultAddress } from './connection.ts';

export const modelsHelp = `mimo models [options]
  --address HOST:PORT  default: ${defaultAddress}
  --api-key KEY        default: $MIMO_API_KEY`;

/** Runs the command; resolves with the exit code. */
export async function runModels(argv: readonly string[], signal: AbortSignal): Promise<number> {
  const { values } = parseArgs({
    args: [...argv],
    options: { address: { type: 'string', default: defaultAddress }, 'api-key': { type: 'string' } },
  });
  const connection = new Connection(values.address, values['api-key'] ?? process.env['MIMO_API_KEY']);
  try {
    for (const model of await connection.listModels(signal)) {
      const { name, maxContextTokens, draftTokens, readyGroups } = model;
      const columns = [
        name.padEnd(24),
        `context ${maxContextTokens}`.padEnd(16),
        `drafts ${draftTokens}`.padEnd(10),
        `${readyGroups} group${readyGroups === 1 ? '' : 's'} ready`,
      ];
      process.stdout.write(`${columns.join(' ')}\n`);
    }
    return 0;
  } finally {
    connection.close();
  }
}
