// A process that reads prompts: entry point, started and ended by prompt-reader.ts. Runs one model's chat template and
// the pattern of its tokenizer, which may loop, crash or exhaust the memory: here they harm only this process. Receives
// one checked prompt per message and sends one reply to each.

import { createContext, Script } from 'node:vm';

import { ClusterError, withheldTextOf } from '@mimo/core/process/errors';
import {
  defaultChatTemplate,
  encodeChat,
  loadTokenizer,
  parseChatTemplate,
  TooManyTokensError,
  type ChatTemplate,
  type Tokenizer,
} from '@mimo/tokenizer';

import { continuesLast, conversationOf } from '../admission/prompt-input.ts';
import type { EncodedPrompt, PromptStage, ReaderMessage, ReadPromptMessage } from './prompt-messages.ts';

const [, , directory = '', timeoutMs = ''] = process.argv;
let stage: PromptStage = 'tokenizer';

// Only a call into a script can have a time limit. The limit also works after this process's gateway is gone.
const script = new Script('call()');
const called: { call: () => EncodedPrompt } = { call: () => ({ tokenIds: [], begun: '' }) };
const context = createContext(called);

function send(message: ReaderMessage, then?: () => void): void {
  process.send?.(message, undefined, {}, then);
}

/** Notes the stage while the template runs. */
function watched(template: ChatTemplate): ChatTemplate {
  return {
    render: (variables) => {
      stage = 'chat template';
      const text = template.render(variables);
      stage = 'tokenizer';
      return text;
    },
  };
}

function read(
  { input, maxTokens }: ReadPromptMessage,
  { tokenizer, template }: { readonly tokenizer: Tokenizer; readonly template: ChatTemplate },
): EncodedPrompt {
  if (input.kind === 'chat') {
    const continueLast = continuesLast(input.messages);
    return encodeChat(tokenizer, template, conversationOf(input.messages), { continueLast, maxTokens });
  }
  const text = input.kind === 'text' ? input.text : '';
  return { tokenIds: tokenizer.encode(text, { allowSpecial: true, maxTokens }), begun: '' };
}

function answer(message: ReadPromptMessage, model: Parameters<typeof read>[1]): void {
  stage = 'tokenizer';
  try {
    called.call = () => read(message, model);
    const prompt: EncodedPrompt = script.runInContext(context, { timeout: Number(timeoutMs) });
    send({ kind: 'read', prompt });
  } catch (error) {
    if (error instanceof TooManyTokensError) {
      send({ kind: 'too many tokens', leastTokens: error.leastTokens });
    } else if (isTimeout(error)) {
      // Its state may be inconsistent, so this process reads no more prompts.
      send({ kind: 'timed out', stage }, () => process.exit(1));
    } else if (error instanceof ClusterError) {
      send({ kind: 'failed', code: error.code, message: error.message });
    } else {
      send({ kind: 'broken', stage, error: withheldTextOf(error) });
    }
  }
}

function isTimeout(error: unknown): boolean {
  return (
    typeof error === 'object' &&
    error !== null &&
    'code' in error &&
    error.code === 'ERR_SCRIPT_EXECUTION_TIMEOUT'
  );
}

// A terminal's Ctrl-C reaches every process of its group, but the gateway drains and still needs its readers.
process.on('SIGINT', () => undefined);
process.on('disconnect', () => process.exit());

try {
  const tokenizer = await loadTokenizer(directory);
  const template = watched(parseChatTemplate(tokenizer.chatTemplate ?? defaultChatTemplate));
  process.on('message', (message: ReadPromptMessage) => answer(message, { tokenizer, template }));
  send({ kind: 'loaded', tokenTable: tokenizer.tokenTable });
} catch (error) {
  const { code, message } = ClusterError.from(error);
  send({ kind: 'failed', code, message }, () => process.exit(1));
}
