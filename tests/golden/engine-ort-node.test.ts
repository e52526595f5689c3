import { describe } from 'vitest';
import { describeEngine } from './engine-suite.ts';

describe("the engine on onnxruntime-node's binding", () => {
  describeEngine('ort-node');
});
