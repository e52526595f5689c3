// Loaded into a rank's process before all else (`node --import`), this makes a step that never ends: once the file
// MIMO_TEST_HANG exists, the rank that it names blocks within its step, in a system call or in JavaScript, and no other
// thread of the process does. The rank first deletes the file, so that the group's next incarnation steps.

import { readFileSync, unlinkSync } from 'node:fs';
import { parentPort, threadName } from 'node:worker_threads';

import { waitReady } from '@mimo/worker/collective/libc';

const file = process.env.MIMO_TEST_HANG ?? '';

function hangWhereAsked() {
  let where = '';
  try {
    where = readFileSync(file, 'utf8');
  } catch {
    return;
  }
  const [rank, kind] = where.split(' ');
  if (rank !== threadName) {
    return;
  }
  unlinkSync(file);
  if (kind === 'native') {
    for (;;) {
      waitReady([], -1);
    }
  }
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
}

if (file !== '' && threadName.startsWith('rank-')) {
  // What a leader does at the end of each step, and a follower at each ping.
  const post = parentPort.postMessage.bind(parentPort);
  parentPort.postMessage = (message, transfer) => {
    if (message.kind === 'frame') {
      hangWhereAsked();
    }
    post(message, transfer);
  };
  const load = Atomics.load;
  Atomics.load = (array, index) => {
    if (threadName !== 'rank-0') {
      hangWhereAsked();
    }
    return load(array, index);
  };
}
