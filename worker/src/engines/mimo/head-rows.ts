// The requested and returned outputs of each head row of a pass. Owns the choice of a token from one row of
// logits on the host, where no device has chosen it; knows no batch and no sequence.

import { argmax, drawToken, type DrawContext, type DrawnToken } from './sampler.ts';

/** What a pass returns of one head row. Rows ask independently: one that wants all logits costs the others nothing. */
export type HeadRequest =
  /** The token of the largest logit, the lowest id at ties. */
  | { readonly kind: 'best' }
  /** A drawn token, with log-probabilities where the sampling asks for them. */
  | { readonly kind: 'sampled'; readonly draw: DrawContext }
  /** All logits of the row. */
  | { readonly kind: 'logits' };

/** A token chosen from a head row. */
export interface ChosenToken extends DrawnToken {
  /** Of the token, after penalties. Not finite where nothing could be chosen, see `problemOf`. */
  readonly logit: number;
}

/** The answer to a request: a token, or the logits. Valid until the next pass. */
export type HeadRow = ChosenToken | Float32Array;

/** Chooses on the host. `row` holds the logits of the ids that may be chosen, and is overwritten. */
export function chooseToken(row: Float32Array, draw: DrawContext): ChosenToken {
  const drawn = drawToken(row, draw);
  return { ...drawn, logit: row[drawn.tokenId] ?? Number.NaN };
}

/** The token of the largest logit, looked for on the host. */
export function bestToken(row: Float32Array): ChosenToken {
  const tokenId = argmax(row);
  return { tokenId, logit: row[tokenId] ?? -Infinity };
}

/** Why a chosen token cannot be taken, for an error; undefined if it can. A device may return anything. */
export function problemOf({ tokenId, logit }: ChosenToken, usableVocab: number): string | undefined {
  if (logit === -Infinity) {
    return 'every token is masked: all logits are -Infinity';
  }
  if (!Number.isFinite(logit)) {
    return `the model computed ${logit} as the logit of token ${tokenId}: its weights or its kernels are damaged`;
  }
  return Number.isInteger(tokenId) && tokenId >= 0 && tokenId < usableVocab
    ? undefined
    : `token ${tokenId} was chosen, but only ${usableVocab} tokens exist`;
}
