// Faults of the network between the boxes of a cluster. A box's virtual cable ends in the control plane's box, where it
// can be cut; packets through a box's own end can be delayed.

import { vethOf, waitForPacketReader, type Box } from './box.ts';

/** Cuts a node off from every other and from the control plane. Its processes keep running. */
export async function cut(node: Box, controlPlane: Box): Promise<void> {
  await controlPlane.run('ip', 'link', 'set', vethOf(node), 'down');
}

/** Ends `cut`. */
export async function heal(node: Box, controlPlane: Box): Promise<void> {
  await controlPlane.run('ip', 'link', 'set', vethOf(node), 'up');
}

/** A node's far line. Pull it in again. */
export interface Delay {
  end(): Promise<void>;
}

const arriving = { chain: 'PREROUTING', from: '--in-interface', queue: 71 } as const;
const leaving = { chain: 'POSTROUTING', from: '--out-interface', queue: 72 } as const;

/**
 * Makes a node far away: whatever reaches or leaves it, also its pods', takes `delayMs`, give or take `jitterMs`,
 * longer in each direction, in order. `program` is `KubernetesTools.delay`; where it ends early nothing is held any
 * more.
 */
export async function delay(
  node: Box,
  options: { readonly program: string; readonly delayMs: number; readonly jitterMs: number },
): Promise<Delay> {
  const { program, delayMs, jitterMs } = options;
  const held = [arriving, leaving];
  const rule = async (flag: '--insert' | '--delete', { chain, from, queue }: (typeof held)[number]) => {
    const which = `--wait --table mangle ${flag} ${chain} ${from} eth0`;
    await node.run('iptables', ...`${which} --jump NFQUEUE --queue-num ${queue} --queue-bypass`.split(' '));
  };
  const processes = await Promise.all(
    held.map(async ({ queue }) => {
      const holding = await node.start(`delay-${queue}`, [
        program,
        String(queue),
        String(delayMs),
        String(jitterMs),
      ]);
      await waitForPacketReader(node, holding, queue);
      return holding;
    }),
  );
  for (const each of held) {
    await rule('--insert', each);
  }
  return {
    end: async () => {
      for (const each of held) {
        await rule('--delete', each);
      }
      // What is still held is given up with the process, as by a line that is torn: TCP sends it again.
      await Promise.all(processes.map((holding) => holding.stop()));
    },
  };
}

/** The shortest time of five packets from one box to another and back, in milliseconds: what the line takes alone. */
export async function roundTripMs(from: Box, to: Box): Promise<number> {
  const text = await from.run('busybox', 'ping', '-c', '5', '-i', '0.2', to.address);
  const shortest = /min\/avg\/max = ([\d.]+)\//.exec(text)?.[1];
  if (shortest === undefined) {
    throw new RangeError(`ping said no times: ${text}`);
  }
  return Number(shortest);
}
