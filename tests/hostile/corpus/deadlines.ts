// Deadlines from zero to eleven thousand years, and invalid headers: each lasts for its stated time, or is rejected as
// malformed. grpc-js alone ends those of 25 days and more at once, and parses a number out of any text.

import { Role } from '@mimo/proto/inference';

import type { HostileSubject } from '../hostile-case.ts';

type Case = HostileSubject['cases'][number];

const messages = [{ role: Role.USER, content: 'What is 47 + 85?' }];

/** Beside the edges of what a signed and an unsigned number of 32 bits hold in milliseconds, 24.855 and 49.71 days. */
const long: Readonly<Record<string, string>> = {
  'a minute': '1M',
  'a day in microseconds': '99999999u',
  'a day': '86400S',
  '24 days': '576H',
  'just below 2^31 ms': '2147483S',
  'just above 2^31 ms': '2147484S',
  '25 days': '600H',
  '25 days in seconds': '2160000S',
  '30 days': '720H',
  '49 days': '1176H',
  'just below 2^32 ms': '4294967S',
  'just above 2^32 ms': '4294968S',
  '50 days': '1200H',
  'a year': '8760H',
  'a year in seconds': '31536000S',
  'ten years': '87600H',
  'ten years in minutes': '5256000M',
  'the most in seconds': '99999999S',
  'the most in minutes': '99999999M',
  'the most': '99999999H',
  'with zeros before it': '00000030S',
};

const short: Readonly<Record<string, string>> = {
  'no time': '0S',
  'no time in hours': '0H',
  'a nanosecond': '1n',
  'a microsecond': '1u',
  'less than a millisecond': '999u',
  'a millisecond': '1m',
  '100 ms': '100m',
  '100 ms in microseconds': '100000u',
  '99.999999 ms': '99999999n',
};

const malformed = [
  'x',
  '5',
  'S',
  '5 S',
  '5s',
  '5h',
  '-5S',
  '+5S',
  '0.5S',
  '5e3m',
  '0x10S',
  '5SS',
  '5S5S',
  'a5Sb',
  '123456789S',
  '1S, 99999999H',
  'Infinity',
  'NaNS',
  `${'9'.repeat(1_000)}H`,
];

export const deadlines: HostileSubject = {
  name: 'deadlines',
  cases: [
    ...Object.entries(long).map(([name, timeout]): Case => ({
      name: `${name}: ${timeout}`,
      send: (world) => world.chat({ messages, sampling: { maxTokens: 2 } }, { timeout }),
      code: 'ok',
    })),
    ...Object.entries(short).map(([name, timeout]): Case => ({
      name: `${name}: ${timeout}`,
      send: (world) => world.chat({ messages, sampling: { ignoreEos: true } }, { timeout }),
      code: 'deadline_exceeded',
      message: /^the deadline passed/,
    })),
    ...malformed.map((timeout): Case => ({
      name: `malformed: ${timeout.slice(0, 20)}`,
      // Header values are latin1.
      send: (world) => world.chat({ messages }, { timeout }),
      code: 'invalid_argument',
      message: /^grpc-timeout must be 1 to 8 digits and a unit \(H, M, S, m, u or n\), not "/,
    })),
  ],
};
