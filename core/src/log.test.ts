import { describe, expect, it } from 'vitest';

import { ClusterError } from './errors.ts';
import { createLog } from './log.ts';

describe('createLog', () => {
  it('writes one JSON object a line, with process, level by name, fields and errors', () => {
    const lines: string[] = [];
    const destination = { write: (line: string) => void lines.push(line) };
    const log = createLog({ process: 'gateway', level: 'info', destination });
    log.debug('not shown');
    log.info({ requestId: 'r1' }, 'accepted');
    log.error({ error: new ClusterError('internal', 'broken') }, 'request failed');
    const [accepted, failed] = lines.map((line) => JSON.parse(line) as Record<string, unknown>);
    expect(lines).toHaveLength(2);
    expect(accepted).toMatchObject({ level: 'info', process: 'gateway', requestId: 'r1', msg: 'accepted' });
    expect(failed).toMatchObject({ level: 'error', error: { message: 'broken', code: 'internal' } });
  });
});
