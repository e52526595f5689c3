// A conversation to the prompt's text and token ids. Owns the rendering of the chat template, the end of the prompt
// when the last message is to be continued, and the guard that keeps special tokens out of users' text. Knows no HTTP
// and no tools' meaning. Templates come from the checkpoint and may loop forever: the caller must be able to stop them.
//
// The guard. A template writes `<|im_end|>` and means the token; a message may hold the same characters and must not.
// Before rendering, every string of the messages and tools that holds a special token's text, or begins or ends with a
// part of one, gets a mark character (one that occurs nowhere else) inside or beside that part. After rendering, only
// unmarked texts become special tokens; then the marks are removed and the text between is encoded as plain text.
// So the ids are those of the whole rendering in the ordinary case, and a message never yields a special token.

import { Template } from '@huggingface/jinja';
import { ClusterError } from '@mimo/core/process/errors';
import { TooManyTokensError, type EncodeOptions, type Tokenizer } from './tokenizer.ts';

/** The speaker of a message. */
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

/** Inputs of a template besides the messages. */
export interface ChatOptions {
  /** Function descriptions, in the JSON form the template prints. */
  readonly tools?: readonly unknown[];
  /** True, the default: end with the opening of the assistant's turn. */
  readonly addGenerationPrompt?: boolean;
  /**
   * True: the prompt ends with the last message's own text, so that the completion continues it. The
   * template's text after it is left out, and so is white space at its end if the template trims it.
   */
  readonly continueLast?: boolean;
  /** Further variables for the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

/** A chat's prompt. */
export interface EncodedChat {
  readonly tokenIds: number[];
  /**
   * The text already in the assistant's turn, which decides between thinking and answer: the continued message, or the
   * tags that the template itself put at the prompt's end.
   */
  readonly begun: string;
}

/** A compiled chat template. */
export interface ChatTemplate {
  render(variables: Record<string, unknown>): string;
}

/** Beyond any tool's schema, within any stack: rendering recurses. */
const maxNesting = 100;

/** Limits a template's text about messages that it refuses. */
const maxReasonUnits = 1_000;

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
 * The prompt's text, for people and tests only: if it were encoded, users' text could name special tokens (see
 * `encodeChat`).
 * Throws `invalid_argument` for no messages, an unknown role, or messages that the template refuses.
 */
export function renderChat(
  template: ChatTemplate,
  messages: readonly ChatMessage[],
  options: ChatOptions = {},
): string {
  return render(template, normalizeMessages(messages), options);
}

/**
 * The prompt. Throws as `renderChat` does, `invalid_argument` for a lone surrogate or if the template leaves out the
 * message to be continued, and `TooManyTokensError` for more tokens than `maxTokens`.
 */
export function encodeChat(
  tokenizer: Tokenizer,
  template: ChatTemplate,
  messages: readonly ChatMessage[],
  options: ChatOptions & Pick<EncodeOptions, 'maxTokens'> = {},
): EncodedChat {
  const { tools, continueLast = false, maxTokens = Infinity } = options;
  const normalized = normalizeMessages(messages);
  const strings = collectStrings([normalized, tools]);
  const edges = edgesOf(tokenizer);
  const guard = createGuard(edges, strings);
  const cut = continueLast ? chooseMark([...strings, ...edges.specials, guard?.mark ?? '']) : '';
  const guarded = guard === undefined ? normalized : normalized.map(guard.protect);
  const rendered = render(template, continueLast ? markEnd(guarded, cut) : guarded, {
    addGenerationPrompt: !continueLast,
    ...options,
    variables: { bos_token: tokenizer.bosToken, eos_token: tokenizer.eosToken, ...options.variables },
    ...(tools === undefined || guard === undefined ? {} : { tools: tools.map(guard.protect) }),
  });
  const prompt = continueLast ? cutAtMark(rendered, cut) : rendered;
  const begun = continueLast ? (normalized.at(-1)?.content ?? '') : (tagsAtEnd.exec(prompt)?.[0] ?? '');
  if (guard === undefined) {
    return { tokenIds: tokenizer.encode(prompt, { allowSpecial: true, maxTokens }), begun };
  }
  const tokenIds: number[] = [];
  const check = (leastTokens: number): void => {
    if (leastTokens > maxTokens) {
      throw new TooManyTokensError(leastTokens, maxTokens);
    }
  };
  check(tokenizer.leastTokens(guard.unmark(prompt)));
  for (const piece of splitSpecials(prompt, edges)) {
    const id = tokenizer.specialTokens.get(piece);
    for (const tokenId of id === undefined ? tokenizer.encode(guard.unmark(piece)) : [id]) {
      tokenIds.push(tokenId);
    }
    check(tokenIds.length);
  }
  return { tokenIds, begun };
}

/** Tags at the end of a prompt: the template opened the thinking, or opened and closed it to switch it off. */
const tagsAtEnd = /(?:<think>\s*)?<\/?think>\s*$/u;

/** The messages with a mark and a space after the last one's text: if the space is gone, the template trims. */
function markEnd(messages: readonly unknown[], mark: string): readonly unknown[] {
  return messages.map((message, index) =>
    index === messages.length - 1 && isMessage(message)
      ? { ...message, content: `${message.content}${mark} ` }
      : message,
  );
}

function isMessage(value: unknown): value is ChatMessage {
  return typeof value === 'object' && value !== null && 'content' in value;
}

function cutAtMark(rendered: string, mark: string): string {
  const end = rendered.lastIndexOf(mark);
  if (end < 0) {
    throw new ClusterError(
      'invalid_argument',
      'the chat template leaves out the last message, so no completion can continue it',
    );
  }
  const prompt = rendered.slice(0, end);
  return rendered.startsWith(' ', end + mark.length) ? prompt : prompt.trimEnd();
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
    if (cause instanceof RangeError) {
      // An endless list, text or recursion: not the messages' fault.
      throw new ClusterError('failed_precondition', `the chat template fails: ${cause.message}`, { cause });
    }
    const reason = cause instanceof Error ? cause.message.slice(0, maxReasonUnits) : String(cause);
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
  readonly mark: string;
  /** The same value with marks in its strings. */
  protect(this: void, value: unknown): unknown;
  unmark(this: void, text: string): string;
}

/** Undefined when no string needs a mark, which is the ordinary case. */
function createGuard(edges: SpecialEdges, strings: readonly string[]): Guard | undefined {
  if (!strings.some((text) => isSuspicious(text, edges))) {
    return undefined;
  }
  const mark = chooseMark([...strings, ...edges.specials]);
  const protectText = (text: string): string => {
    if (!isSuspicious(text, edges)) {
      return text;
    }
    let marked = text;
    for (const special of edges.specials) {
      while (marked.includes(special)) {
        marked = marked.replaceAll(special, special.slice(0, 1) + mark + special.slice(1));
      }
    }
    return (beginsInside(text, edges) ? mark : '') + marked + (endsInside(text, edges) ? mark : '');
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
  return { mark, protect, unmark: (text) => text.replaceAll(mark, '') };
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

/** The texts and patterns that find a special token or a part of one. */
interface SpecialEdges {
  readonly specials: readonly string[];
  /** The leftmost special token, the longest where several begin; undefined if there are none. */
  readonly any: RegExp | undefined;
  /** Proper beginnings and ends, such as "<|im" and "|>". */
  readonly heads: ReadonlySet<string>;
  readonly tails: ReadonlySet<string>;
  readonly longestUnits: number;
}

const edgesByTokenizer = new WeakMap<Tokenizer, SpecialEdges>();

function edgesOf(tokenizer: Tokenizer): SpecialEdges {
  let edges = edgesByTokenizer.get(tokenizer);
  if (edges === undefined) {
    const specials = [...tokenizer.specialTokens.keys()].toSorted((a, b) => b.length - a.length);
    const cuts = specials.flatMap((special) =>
      Array.from({ length: special.length - 1 }, (_, i) => ({ special, at: i + 1 })),
    );
    edges = {
      specials,
      any:
        specials.length === 0
          ? undefined
          : new RegExp(`(${specials.map((special) => RegExp.escape(special)).join('|')})`, 'u'),
      heads: new Set(cuts.map(({ special, at }) => special.slice(0, at))),
      tails: new Set(cuts.map(({ special, at }) => special.slice(at))),
      longestUnits: specials[0]?.length ?? 0,
    };
    edgesByTokenizer.set(tokenizer, edges);
  }
  return edges;
}

/**
 * Whether a text could be a special token or, beside the template's own text or another message's, a part of one. A
 * text of letters only passes, though it may lie inside one: templates compare such texts (roles, names), and
 * none prints letters between the halves of a token.
 */
function isSuspicious(text: string, edges: SpecialEdges): boolean {
  if (/^\p{L}*$/u.test(text)) {
    return false;
  }
  return edges.any?.test(text) === true || beginsInside(text, edges) || endsInside(text, edges);
}

/** Whether the text begins with an end of a special token, or lies within one. */
function beginsInside(text: string, { specials, tails, longestUnits }: SpecialEdges): boolean {
  return (
    (text.length <= longestUnits && specials.some((special) => special.includes(text))) ||
    isAnyUnits(text, longestUnits, (units) => tails.has(text.slice(0, units)))
  );
}

/** Whether the text ends with a beginning of a special token. */
function endsInside(text: string, { heads, longestUnits }: SpecialEdges): boolean {
  return isAnyUnits(text, longestUnits, (units) => heads.has(text.slice(text.length - units)));
}

/** Whether the rule holds for any part of a text that is shorter than a special token may be. */
function isAnyUnits(text: string, longestUnits: number, rule: (units: number) => boolean): boolean {
  for (let units = 1; units < longestUnits && units <= text.length; units += 1) {
    if (rule(units)) {
      return true;
    }
  }
  return false;
}

/** A private-use character that occurs in none of the texts. */
function chooseMark(texts: readonly string[]): string {
  for (let code = 0xe000; code <= 0xf8ff; code += 1) {
    const mark = String.fromCharCode(code);
    if (!texts.some((text) => text.includes(mark))) {
      return mark;
    }
  }
  throw new ClusterError('invalid_argument', 'messages hold every private-use character');
}

/** Cuts at special tokens. Joined again, the pieces are the text. */
function splitSpecials(text: string, { any }: SpecialEdges): string[] {
  return any === undefined ? [text] : text.split(any).filter((piece) => piece !== '');
}
