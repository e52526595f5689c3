// What the project `kubernetes` does before its first test: has the programs of Kubernetes built, outside any test's
// time limit. A machine on which that is impossible fails here, with what to do.

import { findTools } from './tools.ts';

export default async function setUp(): Promise<void> {
  await findTools();
}
