// The messages between the gateway and its prompt readers. Types only.

import type { ErrorCode } from '@mimo/core/process/errors';
import type { TokenTableData } from '@mimo/tokenizer';

import type { PromptInput } from '../admission/prompt-input.ts';

/** A prompt's ids, and the part of the completion's text that it already has. */
export interface EncodedPrompt {
  readonly tokenIds: readonly number[];
  readonly begun: string;
}

/** A prompt, and how many tokens it may have. */
export interface ReadPromptMessage {
  readonly input: PromptInput;
  readonly maxTokens: number;
}

/** The step that was running. */
export type PromptStage = 'chat template' | 'tokenizer';

/** A reader's first message, and then its answer to each prompt. */
export type ReaderMessage =
  | { readonly kind: 'loaded'; readonly tokenTable: TokenTableData }
  | { readonly kind: 'read'; readonly prompt: EncodedPrompt }
  | { readonly kind: 'too many tokens'; readonly leastTokens: number }
  | { readonly kind: 'failed'; readonly code: ErrorCode; readonly message: string }
  /** An unexpected error; `error` is its kind and place, without text that could quote the prompt. */
  | { readonly kind: 'broken'; readonly stage: PromptStage; readonly error: string }
  /** The reader ends after this one. */
  | { readonly kind: 'timed out'; readonly stage: PromptStage };
