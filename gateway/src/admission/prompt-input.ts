// A prompt as a client sent it: a conversation, a text or token ids. Pure.

import { Role, type Message } from '@mimo/proto/inference';
import type { ChatMessage } from '@mimo/tokenizer';

/** A client's prompt. */
export type PromptInput =
  | { readonly kind: 'chat'; readonly messages: readonly Message[] }
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'tokens'; readonly tokenIds: readonly number[] }
  | { readonly kind: 'none' };

/** The texts to tokenise. */
export function textsOf(input: PromptInput): string[] {
  if (input.kind === 'chat') {
    return input.messages.map(({ content }) => content);
  }
  return input.kind === 'text' ? [input.text] : [];
}

/** The cost of a message beside its text, in letters: the template's additions, and its rendering. */
const messageCharacters = 128;

/** The cost of rendering and tokenising a prompt, in letters: an empty message is not free. */
export function promptCost(input: PromptInput): number {
  const characters = textsOf(input).reduce((sum, text) => sum + text.length, 0);
  return input.kind === 'chat' ? characters + messageCharacters * input.messages.length : characters;
}

/** The roles of a conversation, as the template names them. */
export const roleNames = new Map<Role, ChatMessage['role']>([
  [Role.SYSTEM, 'system'],
  [Role.USER, 'user'],
  [Role.ASSISTANT, 'assistant'],
]);

/** Whether the completion continues the conversation's last message instead of answering it. */
export function continuesLast(messages: readonly Message[]): boolean {
  return messages.at(-1)?.role === Role.ASSISTANT;
}

/**
 * The conversation as the template expects it: with an empty system message first if there is none, as MiMo recommends.
 */
export function conversationOf(messages: readonly Message[]): ChatMessage[] {
  const conversation = messages.map(({ role, content }) => ({
    role: roleNames.get(role) ?? 'user',
    content,
  }));
  return conversation[0]?.role === 'system'
    ? conversation
    : [{ role: 'system', content: '' }, ...conversation];
}
