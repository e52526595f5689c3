// The requested and returned outputs of each head row of a pass. Owns the choice of a token from one row of
// logits on the host, if no device has chosen it; knows no batch and no sequence.

import { argmax, drawToken, type DrawContext, type DrawnToken } from './sampler.ts';

/**
 * The requested output of one head row. Requests are independent: a row that needs all logits costs the others nothing.
 */
export type HeadRequest =
  /** The token of the largest logit, the lowest id at ties. */
  | { readonly kind: 'best' }
  /** A drawn token, with log-probabilities if the sampling requests them. */
  | { readonly kind: 'sampled'; readonly draw: DrawContext }
  /** All logits of the row. */
  | { readonly kind: 'logits' };

/** A token chosen from a head row. */
export interface ChosenToken extends DrawnToken {
  /** The token's logit, after penalties. Not finite if no token could be chosen, see `problemOf`. */
  readonly logit: number;
}

/** The answer to a request: a token, or the logits. Valid until the next pass. */
export type HeadRow = ChosenToken | Float32Array;

/** Chooses on the host. `row` holds the logits of the ids that may be chosen, and is overwritten. */
export function chooseToken(row: Float32Array, draw: DrawContext): ChosenToken {
  const drawn = drawToken(row, draw);
  return { ...drawn, logit: row[drawn.tokenId] ?? Number.NaN };
}

/** The token of the largest logit, found on the host. */
export function bestToken(row: Float32Array): ChosenToken {
  const tokenId = argmax(row);
  return { tokenId, logit: row[tokenId] ?? -Infinity };
}

/** Why a chosen token is invalid, for an error; undefined if it is valid. A device may return anything. */
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
