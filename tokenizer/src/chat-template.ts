// A conversation to the prompt's text and token ids. Owns the chat template's rendering and the guard that keeps special
// tokens out of what users wrote; knows no HTTP and no tools' meaning. Templates come from the checkpoint and are
// trusted: one that loops for ever would hang the caller.
//
// The guard. A template writes `<|im_end|>` and means the token; a message may hold the same characters and must not.
// Before rendering, every string of the messages and tools that holds a special token's text, or begins or ends with a
// part of one, gets a mark character (one that occurs nowhere else) inside or beside that part. After rendering, only
// unmarked texts are taken as special tokens, then the marks are removed and what lies between is encoded as plain
// text. So the ids are those of the whole rendering in the ordinary case, and a message never yields a special token.

import { Template } from '@huggingface/jinja';
import { ClusterError } from '@mimo/core/errors';
import type { Tokenizer } from './tokenizer.ts';

/** Who speaks. */
export type ChatRole = 'system' | 'user' | 'assistant' | 'tool';

/** A call that the assistant made in an earlier turn. */
export interface ChatToolCall {
  readonly id?: string;
  readonly type?: 'function';
  readonly function: {
    readonly name: string;
    /** An object, or the JSON text of one. */
    readonly arguments: unknown;
  };
}

/**
 * One message, with the field names that chat templates read. A system message with empty content is not the same as no
 * system message: the latter makes MiMo's template insert its default sentence.
 */
export interface ChatMessage {
  readonly role: ChatRole;
  /** Null, as in an assistant's turn that only calls tools, is rendered as empty. */
  readonly content: string | null;
  readonly name?: string;
  readonly tool_calls?: readonly ChatToolCall[];
  readonly tool_call_id?: string;
}

/** What a template may use besides the messages. */
export interface ChatOptions {
  /** Function descriptions, in the JSON form the template prints. */
  readonly tools?: readonly unknown[];
  /** True, the default: end with the opening of the assistant's turn. */
  readonly addGenerationPrompt?: boolean;
  /** Further variables for the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

/** A compiled chat template. */
export interface ChatTemplate {
  render(variables: Record<string, unknown>): string;
}

/** Beyond any tool's schema, within any stack: rendering recurses. */
const maxNesting = 100;

const roles: ReadonlySet<string> = new Set<ChatRole>(['system', 'user', 'assistant', 'tool']);

/** Compiles Jinja source, once per checkpoint. Throws `failed_precondition` when it does not parse. */
export function parseChatTemplate(source: string): ChatTemplate {
  try {
    return new Template(source);
  } catch (cause) {
    throw new ClusterError('failed_precondition', 'the chat template does not parse', { cause });
  }
}

/**
 * The prompt's text, for people and tests: encoding it would let users' text name special tokens (see `encodeChat`).
 * Throws `invalid_argument` for no messages, an unknown role, or messages that the template refuses.
 */
export function renderChat(
  template: ChatTemplate,
  messages: readonly ChatMessage[],
  options: ChatOptions = {},
): string {
  return render(template, normalizeMessages(messages), options);
}

/** The prompt's token ids. Throws as `renderChat` does, and `invalid_argument` for a lone surrogate. */
export function encodeChat(
  tokenizer: Tokenizer,
  template: ChatTemplate,
  messages: readonly ChatMessage[],
  options: ChatOptions = {},
): number[] {
  const variables = { bos_token: tokenizer.bosToken, eos_token: tokenizer.eosToken, ...options.variables };
  const normalized = normalizeMessages(messages);
  const specials = [...tokenizer.specialTokens.keys()];
  const guard = createGuard(specials, [normalized, options.tools]);
  if (guard === undefined) {
    return tokenizer.encode(render(template, normalized, { ...options, variables }), { allowSpecial: true });
  }
  const tools = options.tools?.map(guard.protect);
  const rendered = render(template, normalized.map(guard.protect), {
    ...options,
    variables,
    ...(tools === undefined ? {} : { tools }),
  });
  const output: number[] = [];
  for (const piece of splitSpecials(rendered, specials)) {
    const id = tokenizer.specialTokens.get(piece);
    for (const tokenId of id === undefined ? tokenizer.encode(guard.unmark(piece)) : [id]) {
      output.push(tokenId);
    }
  }
  return output;
}

function render(template: ChatTemplate, messages: readonly unknown[], options: ChatOptions): string {
  try {
    return template.render({
      ...options.variables,
      messages,
      add_generation_prompt: options.addGenerationPrompt ?? true,
      ...(options.tools === undefined || options.tools.length === 0 ? {} : { tools: options.tools }),
    });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new ClusterError('invalid_argument', `the chat template refuses the messages: ${reason}`, {
      cause,
    });
  }
}

/** Checks roles, makes null content empty and opens arguments given as JSON text, which templates print as JSON. */
function normalizeMessages(messages: readonly ChatMessage[]): ChatMessage[] {
  if (messages.length === 0) {
    throw new ClusterError('invalid_argument', 'messages is empty, at least one is needed');
  }
  return messages.map((message, index) => {
    if (!roles.has(message.role)) {
      throw new ClusterError(
        'invalid_argument',
        `messages[${index}].role ${JSON.stringify(message.role)} is unknown`,
      );
    }
    const calls = message.tool_calls?.map((call) => ({
      ...call,
      function: { ...call.function, arguments: openArguments(call.function.arguments) },
    }));
    return {
      ...message,
      content: message.content ?? '',
      ...(calls === undefined ? {} : { tool_calls: calls }),
    };
  });
}

function openArguments(given: unknown): unknown {
  if (typeof given !== 'string') {
    return given;
  }
  try {
    const value: unknown = JSON.parse(given);
    return typeof value === 'object' && value !== null ? value : given;
  } catch {
    return given;
  }
}

interface Guard {
  /** The same value with marks in its strings. */
  protect(this: void, value: unknown): unknown;
  unmark(this: void, text: string): string;
}

/** Undefined when no string needs a mark, which is the ordinary case. */
function createGuard(specials: readonly string[], values: readonly unknown[]): Guard | undefined {
  const strings = collectStrings(values);
  if (!strings.some((text) => isSuspicious(text, specials))) {
    return undefined;
  }
  const mark = chooseMark([...strings, ...specials]);
  const protectText = (text: string): string => {
    if (!isSuspicious(text, specials)) {
      return text;
    }
    let marked = text;
    for (const special of specials) {
      while (marked.includes(special)) {
        marked = marked.replaceAll(special, special.slice(0, 1) + mark + special.slice(1));
      }
    }
    return (beginsInside(text, specials) ? mark : '') + marked + (endsInside(text, specials) ? mark : '');
  };
  const protect = (value: unknown): unknown => {
    if (typeof value === 'string') {
      return protectText(value);
    }
    if (Array.isArray(value)) {
      return value.map(protect);
    }
    if (typeof value === 'object' && value !== null) {
      return Object.fromEntries(
        Object.entries(value).map(([key, held]) => [protectText(key), protect(held)]),
      );
    }
    return value;
  };
  return { protect, unmark: (text) => text.replaceAll(mark, '') };
}

/** Every string in the values, keys included, level by level. */
function collectStrings(values: readonly unknown[]): string[] {
  const strings: string[] = [];
  let level = values;
  for (let depth = 0; level.length > 0; depth += 1) {
    if (depth > maxNesting) {
      throw new ClusterError(
        'invalid_argument',
        `messages or tools are nested deeper than ${maxNesting} levels`,
      );
    }
    const below: unknown[] = [];
    for (const value of level) {
      if (typeof value === 'string') {
        strings.push(value);
      } else if (Array.isArray(value)) {
        for (const held of value) {
          below.push(held);
        }
      } else if (typeof value === 'object' && value !== null) {
        for (const [key, held] of Object.entries(value)) {
          strings.push(key);
          below.push(held);
        }
      }
    }
    level = below;
  }
  return strings;
}

/**
 * Whether a text could be a special token or, beside the template's own text or another message's, a part of one. A text
 * of letters only is let through, though it may lie inside one: templates compare such texts (roles, names), and none
 * prints letters between the halves of a token.
 */
function isSuspicious(text: string, specials: readonly string[]): boolean {
  if (/^\p{L}*$/u.test(text)) {
    return false;
  }
  return (
    specials.some((special) => text.includes(special)) ||
    beginsInside(text, specials) ||
    endsInside(text, specials)
  );
}

/** Whether the text begins with an end of a special token, or lies within one. */
function beginsInside(text: string, specials: readonly string[]): boolean {
  return specials.some(
    (special) => special.includes(text) || tailsOf(special).some((tail) => text.startsWith(tail)),
  );
}

/** Whether the text ends with a beginning of a special token. */
function endsInside(text: string, specials: readonly string[]): boolean {
  return specials.some((special) =>
    tailsOf(special).some((tail) => text.endsWith(special.slice(0, -tail.length))),
  );
}

/** The proper ends of a text, such as "|>" and ">" of "a|>"; cutting one off leaves a proper beginning. */
function tailsOf(text: string): string[] {
  return Array.from({ length: text.length - 1 }, (_, i) => text.slice(i + 1));
}

/** A private-use character that no text holds. */
function chooseMark(texts: readonly string[]): string {
  for (let code = 0xe000; code <= 0xf8ff; code += 1) {
    const mark = String.fromCharCode(code);
    if (!texts.some((text) => text.includes(mark))) {
      return mark;
    }
  }
  throw new ClusterError('invalid_argument', 'messages hold special tokens and every private-use character');
}

/** Cuts at special tokens, leftmost first, the longest where several begin. Joined again, the pieces are the text. */
function splitSpecials(text: string, specials: readonly string[]): string[] {
  if (specials.length === 0) {
    return [text];
  }
  const longestFirst = specials
    .toSorted((a, b) => b.length - a.length)
    .map((special) => RegExp.escape(special));
  return text.split(new RegExp(`(${longestFirst.join('|')})`, 'u')).filter((piece) => piece !== '');
}
