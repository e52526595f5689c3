// Every subject of the corpus. A new one is added here.

import type { HostileSubject } from '../hostile-case.ts';
import { requests } from './requests.ts';

export const subjects: readonly HostileSubject[] = [requests];
