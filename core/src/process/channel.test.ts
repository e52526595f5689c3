import { describe, expect, it } from 'vitest';

import { Channel, channelUntil } from './channel.ts';

async function all<T>(values: AsyncIterable<T>): Promise<T[]> {
  const gathered: T[] = [];
  for await (const value of values) {
    gathered.push(value);
  }
  return gathered;
}

describe('Channel', () => {
  it('yields items pushed before and during reading, in order, and ends when closed', async () => {
    const channel = new Channel<number>();
    channel.push(1);
    const reading = all(channel);
    channel.push(2);
    await Promise.resolve();
    channel.push(3);
    channel.close();
    channel.push(4);
    expect(await reading).toEqual([1, 2, 3]);
    expect(channel.pending).toBe(0);
  });

  it('yields the remaining items, then throws the error it failed with', async () => {
    const channel = new Channel<number>();
    channel.push(1);
    channel.fail(new Error('broken'));
    const iterator = channel[Symbol.asyncIterator]();
    expect(await iterator.next()).toEqual({ done: false, value: 1 });
    await expect(iterator.next()).rejects.toThrow('broken');
  });

  it('keeps no items once its reader has left', async () => {
    const channel = new Channel<number>();
    channel.push(1);
    channel.push(2);
    for await (const _ of channel) {
      break;
    }
    channel.push(3);
    expect(channel.pending).toBe(0);
  });
});

describe('channelUntil', () => {
  it('ends with its signal, even if that has already fired', async () => {
    const stop = new AbortController();
    const reading = all(channelUntil<number>(stop.signal));
    stop.abort();
    expect(await reading).toEqual([]);
    expect(await all(channelUntil<number>(stop.signal))).toEqual([]);
  });
});
