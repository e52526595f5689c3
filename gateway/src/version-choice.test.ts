import { modelIdentity, textDigestOf } from '@mimo/core/bus/model-identity';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { chooseVersion, type ModelVersion } from './version-choice.ts';

type GroupLoad = Parameters<typeof chooseVersion>[1][number];

const [oldText = '', newText = ''] = ['old', 'new'].map((text) =>
  textDigestOf(new Map([['tokenizer.json', Buffer.from(text)]])),
);
const oldVersion: ModelVersion = { identity: modelIdentity(oldText, 'a'), textDigest: oldText };
const newVersion: ModelVersion = { identity: modelIdentity(newText, 'b'), textDigest: newText };
const directory: ModelVersion = { identity: '', textDigest: newText };

function group(identity: string, used = 0): GroupLoad {
  return { identity, maxSequences: 4, runningSequences: used, waitingSequences: 0 };
}

const chances = Array.from({ length: 100 }, (_, at) => at / 100);

describe('chooseVersion', () => {
  it('chooses the newest version while no group serves', () => {
    expect(chooseVersion([newVersion, oldVersion], [], 0.5)).toMatchObject({
      version: newVersion,
      identity: newVersion.identity,
    });
    expect(chooseVersion([directory], [], 0.5)).toMatchObject({ version: directory, identity: '' });
  });

  it('chooses the old version, with its tokenizer, until a group of the newest serves', () => {
    expect(chooseVersion([newVersion, oldVersion], [group(oldVersion.identity, 4)], 0.9)).toMatchObject({
      version: oldVersion,
      identity: oldVersion.identity,
    });
  });

  it('divides new requests between versions by slots, and sends an old version no more than its free slots', () => {
    const shareOfOld = (...groups: readonly GroupLoad[]): number =>
      chances.filter(
        (chance) => chooseVersion([newVersion, oldVersion], groups, chance).version === oldVersion,
      ).length;
    const { identity } = newVersion;
    expect(shareOfOld(group(identity), group(oldVersion.identity))).toBe(50);
    expect(shareOfOld(group(identity, 4), group(oldVersion.identity, 3))).toBe(20);
    expect(shareOfOld(group(identity, 4), group(oldVersion.identity, 4))).toBe(0);
  });

  it('uses a group of unknown weights if its tokenizer is loaded, and none with another tokenizer', () => {
    const sameText = modelIdentity(newText, 'c');
    expect(chooseVersion([newVersion], [group(sameText)], 0)).toMatchObject({
      version: newVersion,
      identity: sameText,
    });
    expect(chooseVersion([directory], [group(sameText)], 0).identity).toBe(sameText);
    // Shards that were compiled elsewhere do not name their tokenizer.
    expect(chooseVersion([directory], [group('.shards')], 0).identity).toBe('.shards');
    const otherText = modelIdentity('cccc', 'c');
    expect(chooseVersion([newVersion], [group(otherText)], 0).identity).toBe(newVersion.identity);
    // An older worker reports no tokenizer.
    expect(chooseVersion([directory], [group('')], 0).identity).toBe('');
  });

  it('never sends a tokenizer’s ids to a group that uses another tokenizer', () => {
    const identities = [oldVersion.identity, newVersion.identity, modelIdentity('x', 'y'), '.z', ''];
    const groups = fc.array(
      fc.record({
        identity: fc.constantFrom(...identities),
        maxSequences: fc.nat(4),
        runningSequences: fc.nat(4),
        waitingSequences: fc.nat(2),
      }),
      { maxLength: 5 },
    );
    const chance = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true });
    fc.assert(
      fc.property(groups, chance, (open, at) => {
        const { version, identity } = chooseVersion([newVersion, oldVersion], open, at);
        expect(identity === '' || identity.startsWith('.') || identity.startsWith(version.textDigest)).toBe(
          true,
        );
      }),
    );
  });
});
