import { describe, expect, it, vi } from 'vitest';

import { ClusterError } from './errors.ts';
import { Lifecycle } from './lifecycle.ts';
import { createLog } from './log.ts';

const log = createLog({ process: 'test', level: 'silent' });

function recorder(): { readonly lifecycle: Lifecycle; readonly steps: string[] } {
  const lifecycle = new Lifecycle({ log, graceMs: 1_000 });
  return { lifecycle, steps: [] };
}

describe('Lifecycle', () => {
  it('drains in order, then closes in reverse, once', async () => {
    const { lifecycle, steps } = recorder();
    lifecycle.onClose('first', () => void steps.push('close first'));
    lifecycle.onClose('second', async () => void steps.push('close second'));
    lifecycle.onDrain('a', async () => void steps.push(`drain a, ${lifecycle.state}`));
    lifecycle.onDrain('b', () => void steps.push(`drain b, closing ${lifecycle.closing.aborted}`));
    lifecycle.ready();
    expect(lifecycle.state).toBe('ready');
    await Promise.all([lifecycle.stop('test'), lifecycle.stop('again')]);
    expect(steps).toEqual(['drain a, draining', 'drain b, closing false', 'close second', 'close first']);
    expect(lifecycle.state).toBe('closed');
    expect(lifecycle.draining.aborted && lifecycle.closing.aborted).toBe(true);
  });

  it('closes parts in reverse order, also when starting failed in between', async () => {
    const { lifecycle, steps } = recorder();
    const part = (name: string) => ({ name, close: () => void steps.push(name) });
    expect(lifecycle.opened('a', part('a'))).toMatchObject({ name: 'a' });
    lifecycle.opened('b', part('b'));
    await lifecycle.stop('test');
    expect(steps).toEqual(['b', 'a']);
  });

  it('reports the first reason why the process cannot continue', async () => {
    const { lifecycle } = recorder();
    lifecycle.end(new ClusterError('aborted', 'a rank was lost'));
    lifecycle.end(new ClusterError('internal', 'something else'));
    expect(await lifecycle.over).toMatchObject({ code: 'aborted', message: 'a rank was lost' });
  });

  it('continues when a step fails', async () => {
    const { lifecycle, steps } = recorder();
    lifecycle.onClose('last', () => void steps.push('closed'));
    lifecycle.onClose('bad', () => Promise.reject(new Error('bad')));
    lifecycle.onDrain('worse', () => {
      throw new Error('worse');
    });
    await lifecycle.stop('test');
    expect(steps).toEqual(['closed']);
  });

  it('closes when the grace is over, even if parts still drain', async () => {
    vi.useFakeTimers();
    try {
      const { lifecycle, steps } = recorder();
      lifecycle.onDrain('endless', async (signal) => {
        signal.addEventListener('abort', () => steps.push('told'));
        await new Promise(() => undefined);
      });
      lifecycle.onClose('x', () => void steps.push('closed'));
      const stopped = lifecycle.stop('test');
      await vi.advanceTimersByTimeAsync(999);
      expect(lifecycle.state).toBe('draining');
      await vi.advanceTimersByTimeAsync(1);
      await stopped;
      expect(steps).toEqual(['told', 'closed']);
    } finally {
      vi.useRealTimers();
    }
  });
});
