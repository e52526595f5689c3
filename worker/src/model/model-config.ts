// CONTRACT SKETCH: to be completed by the owner of worker/src/model.

/** A checkpoint's architecture, validated. */
export interface ModelConfig {
  readonly hiddenSize: number;
  readonly layers: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly intermediateSize: number;
  readonly vocabSize: number;
  readonly mtpLayers: number;
  readonly rmsNormEps: number;
  readonly ropeTheta: number;
  readonly maxPositions: number;
  readonly bosTokenId: number | null;
  /** Ids that end a completion: config's and generation_config's eos, and `<|endoftext|>` where known. */
  readonly eosTokenIds: readonly number[];
}
