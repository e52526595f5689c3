import { describe } from 'vitest';
import { describeEngine } from './engine-suite.ts';

describe('the engine on the C API', () => {
  describeEngine('ort-capi');
});
