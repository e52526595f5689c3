// Every subject of the corpus. A new one is added here.

import type { HostileSubject } from '../hostile-case.ts';
import { cancel } from './cancel.ts';
import { modelFiles } from './model-files.ts';
import { deadlines } from './deadlines.ts';
import { numbers } from './numbers.ts';
import { quotes } from './quotes.ts';
import { requests } from './requests.ts';
import { stalledReaders } from './stalled-readers.ts';
import { text } from './text.ts';
import { wire } from './wire.ts';

export const subjects: readonly HostileSubject[] = [
  cancel,
  deadlines,
  modelFiles,
  numbers,
  quotes,
  requests,
  stalledReaders,
  text,
  wire,
];
