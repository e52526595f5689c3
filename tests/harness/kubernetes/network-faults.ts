// Faults of the network between the boxes of a cluster. A box's cable ends in the control plane's box, where it can be
// pulled out, and where the packets that cross the bridge can be dropped.

import { vethOf, type Box } from './box.ts';

/** Cuts a node off from every other and from the control plane. What runs on it goes on. */
export async function cut(node: Box, controlPlane: Box): Promise<void> {
  await controlPlane.run('ip', 'link', 'set', vethOf(node), 'down');
}

/** Ends `cut`. */
export async function heal(node: Box, controlPlane: Box): Promise<void> {
  await controlPlane.run('ip', 'link', 'set', vethOf(node), 'up');
}
