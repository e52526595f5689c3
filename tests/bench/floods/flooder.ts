// The attacker of the benchmark `floods`: `flooder.ts NAME ADDRESS KEY SCALE FROM` floods until it is killed.

import { floods } from '../../harness/floods.ts';

const [name = '', address = '', apiKey = '', scale = '1', localAddress = '127.0.0.1'] = process.argv.slice(2);
const flood = floods[name];
if (flood === undefined) {
  throw new RangeError(`there is no flood ${name}`);
}
process.stdout.write('flooding\n');
await flood({ address, apiKey, scale: Number(scale), localAddress }, new AbortController().signal);
