// Which version of a model a request is bound to, while groups of several may serve under one name. Pure.
//
// The rule: candidates are the identities of groups with room for requests that use the tokens of a loaded tokenizer.
// One is drawn by weight: the newest version by its slots, an older one by its free slots, so that its backlog only
// shrinks. Without a candidate the request waits for the newest version.
//
// INVARIANT: groups of the identity use the tokens of the version's tokenizer.

import { readsText } from '@mimo/core/bus/model-identity';
import type { Heartbeat } from '@mimo/proto/worker';

/** The loaded parts of one version. */
export interface ModelVersion {
  /** From the catalogue; empty: unknown, as for a model from a directory. */
  readonly identity: string;
  /** Of its tokenizer and template: core's model-identity. */
  readonly textDigest: string;
}

/** Chooses among `versions`, the newest first and at least one; `chance` is from 0 to 1, 1 excluded. */
export function chooseVersion<Version extends ModelVersion>(
  versions: readonly [Version, ...Version[]],
  groups: readonly Pick<Heartbeat, 'identity' | 'maxSequences' | 'runningSequences' | 'waitingSequences'>[],
  chance: number,
): { readonly version: Version; readonly identity: string } {
  const [newest] = versions;
  const options = [...Map.groupBy(groups, ({ identity }) => identity)].flatMap(([identity, members]) => {
    const version =
      versions.find((each) => each.identity === identity) ??
      versions.find(({ textDigest }) => readsText(identity, textDigest));
    const slots = members.reduce((sum, { maxSequences }) => sum + maxSequences, 0);
    const used = members.reduce((sum, each) => sum + each.runningSequences + each.waitingSequences, 0);
    return version === undefined ? [] : [{ version, identity, slots, free: Math.max(0, slots - used) }];
  });
  const hasNewest = options.some(({ identity }) => identity === newest.identity);
  let left = 0;
  const weighed = options.map((option) => {
    const weight = hasNewest && option.identity !== newest.identity ? option.free : Math.max(1, option.slots);
    left += weight;
    return { ...option, until: left };
  });
  const drawn = weighed.find(({ until }) => chance * left < until);
  return drawn ?? { version: newest, identity: newest.identity };
}
