// The public API of the tokenizer.

export {
  loadTokenizer,
  createTokenizer,
  TooManyTokensError,
  type DecodeOptions,
  type EncodeOptions,
  type Tokenizer,
} from './tokenizer.ts';
export { createTokenTable, type TokenTable, type TokenTableData } from './token-table.ts';
export {
  parseTokenizerFiles,
  readTokenizerFiles,
  type TokenizerDescription,
  type TokenizerFiles,
} from './tokenizer-files.ts';
export {
  encodeChat,
  parseChatTemplate,
  renderChat,
  type ChatMessage,
  type ChatOptions,
  type ChatRole,
  type ChatTemplate,
  type ChatToolCall,
  type EncodedChat,
} from './chat-template.ts';
export { defaultChatTemplate } from './default-template.ts';
export { StreamDecoder } from './stream-decoder.ts';
export { ReasoningSplitter, type ReasoningDelta, type ReasoningOptions } from './reasoning.ts';
export { StopStringMatcher, type StopResult } from './stop-strings.ts';
