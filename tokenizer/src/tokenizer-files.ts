// A checkpoint's tokenizer files, read leniently and checked. Owns the formats of tokenizer.json,
// tokenizer_config.json, chat_template.jinja and the older vocab.json with merges.txt; encodes nothing. A
// feature that we or the library do not implement as Hugging Face's Rust code does is refused here, so that no text
// is ever encoded to a wrong id.

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { ClusterError } from '@mimo/core/process/errors';
import { characterFromByte } from './byte-level.ts';

/** The files' contents; an absent file is undefined. */
export interface TokenizerFiles {
  readonly tokenizerJson: string | undefined;
  readonly tokenizerConfigJson: string | undefined;
  readonly chatTemplateJinja: string | undefined;
  readonly vocabJson: string | undefined;
  readonly mergesTxt: string | undefined;
}

/** The whole content of the tokenizer files of one checkpoint. */
export interface TokenizerDescription {
  /** The rules for plain text: a tokenizer.json without its added tokens and without fields that we do not need. */
  readonly bytePair: z.output<typeof bytePairSchema>;
  /** The vocabulary entries that are matched in the raw text, before BPE; by id. */
  readonly addedTokens: readonly z.output<typeof addedTokenSchema>[];
  /** Jinja source; undefined when the checkpoint has none. */
  readonly chatTemplate: string | undefined;
  readonly bosToken: string | undefined;
  readonly eosToken: string | undefined;
}

// In these schemas a literal is the only implemented value, and its violation is `failed_precondition`; any other
// violation is `data_loss`.
const notUsed = z.literal([null, false, 0, '']).optional();

/** Ids index tables, so a wild one must not size them. */
const tokenId = z
  .int()
  .nonnegative()
  .lt(2 ** 21);

/** Far beyond a real vocabulary's longest entry, and little for a stream that one token may add to. */
const spellingMaxUnits = 4_096;
const vocabularySpelling = z.string().max(spellingMaxUnits);

const bytePairSchema = z.object({
  model: z
    .object({
      type: z.literal('BPE'),
      vocab: z.record(vocabularySpelling, tokenId),
      /** In older files lines with one space between the halves. */
      merges: z.array(
        z.preprocess(
          (merge) => (typeof merge === 'string' ? merge.split(' ') : merge),
          z.tuple([z.string(), z.string()]),
        ),
      ),
      ignore_merges: z.boolean().default(false),
      dropout: notUsed,
      continuing_subword_prefix: notUsed,
      end_of_word_suffix: notUsed,
      byte_fallback: notUsed,
    })
    .superRefine(({ vocab, merges }, context) => {
      const isMissing = (spelling: string): boolean => !Object.hasOwn(vocab, spelling);
      const byte = characterFromByte.findIndex(isMissing);
      const merge = merges.findIndex((halves) => isMissing(halves.join('')));
      if (byte >= 0 || merge >= 0) {
        // Text would be dropped silently.
        const message = `no entry for ${byte >= 0 ? `byte ${byte}` : `merge ${merge}`}`;
        context.addIssue({ code: 'custom', path: ['vocab'], message, input: vocab });
      }
    }),
  normalizer: z.object({ type: z.literal('NFC') }).nullable(),
  // ByteLevel's own pattern is refused: the library's treats U+FEFF as a space, and U+0085 not.
  pre_tokenizer: z.object({
    type: z.literal('Sequence'),
    pretokenizers: z.tuple([
      z.object({
        type: z.literal('Split'),
        pattern: z.object({ Regex: z.string() }),
        behavior: z.literal('Isolated'),
        invert: z.literal(false).default(false),
      }),
      z.object({ type: z.literal('ByteLevel'), add_prefix_space: notUsed, use_regex: z.literal(false) }),
    ]),
  }),
  decoder: z.object({ type: z.literal('ByteLevel') }),
});

const addedTokenSchema = z.object({
  id: tokenId,
  content: vocabularySpelling.min(1),
  /** The file's own flag. */
  special: z.boolean().default(false),
  lstrip: notUsed,
  rstrip: notUsed,
  single_word: notUsed,
});

const tokenizerSchema = bytePairSchema.extend({ added_tokens: z.array(addedTokenSchema).default([]) });

/** A string, or an object that describes an added token. */
const tokenText = z
  .union([z.string(), z.object({ content: z.string() }).transform(({ content }) => content)])
  .optional()
  .catch(undefined);

/** Unknown fields are ignored, and so is `tokenizer_class`: MiMo's is a list. */
const configSchema = z.object({
  bos_token: tokenText,
  eos_token: tokenText,
  /** A string, or a list of named templates, of which "default" is used. */
  chat_template: z
    .union([
      z.string(),
      z
        .array(z.object({ name: z.string(), template: z.string() }))
        .transform((templates) => templates.find(({ name }) => name === 'default')?.template),
    ])
    .optional()
    .catch(undefined),
  added_tokens_decoder: z
    .record(z.string(), z.looseObject({}))
    .transform((tokens) =>
      Object.entries(tokens).map(([id, token]) => Object.assign(token, { id: Number(id) })),
    )
    .pipe(z.array(addedTokenSchema))
    .default([]),
});

/** Qwen2's tokenizer.json without the model; it also applies to a checkpoint with vocab.json and merges.txt only. */
const qwen2Steps = {
  normalizer: { type: 'NFC' },
  pre_tokenizer: {
    type: 'Sequence',
    pretokenizers: [
      {
        type: 'Split',
        pattern: {
          Regex:
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        },
        behavior: 'Isolated',
      },
      { type: 'ByteLevel', use_regex: false },
    ],
  },
  decoder: { type: 'ByteLevel' },
};

/** Reads the files of the directory. Absent files are undefined; any other reading error is thrown as `unavailable`. */
export async function readTokenizerFiles(directory: string): Promise<TokenizerFiles> {
  const [tokenizerJson, tokenizerConfigJson, chatTemplateJinja, vocabJson, mergesTxt] = await Promise.all(
    ['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'vocab.json', 'merges.txt'].map(
      (name) => readOptional(join(directory, name)),
    ),
  );
  return { tokenizerJson, tokenizerConfigJson, chatTemplateJinja, vocabJson, mergesTxt };
}

/**
 * Parses the files: tokenizer.json if present, else vocab.json with merges.txt and Qwen2's splitting rules. Throws
 * `failed_precondition` when there is no vocabulary or it needs something unsupported, `data_loss` when a file is
 * malformed.
 */
export function parseTokenizerFiles(files: TokenizerFiles): TokenizerDescription {
  const config = check(
    configSchema,
    parseJson(files.tokenizerConfigJson ?? '{}', 'tokenizer_config.json'),
    'tokenizer_config.json',
  );
  const { added_tokens: ownTokens, ...bytePair } = parseTokenizer(files);
  const addedTokens = new Map(
    [...config.added_tokens_decoder, ...ownTokens].map((token) => [token.id, token]),
  );
  return {
    bytePair,
    addedTokens: [...addedTokens.values()].toSorted((a, b) => a.id - b.id),
    chatTemplate: files.chatTemplateJinja ?? config.chat_template,
    bosToken: config.bos_token,
    eosToken: config.eos_token,
  };
}

function parseTokenizer({
  tokenizerJson,
  vocabJson,
  mergesTxt,
}: TokenizerFiles): z.output<typeof tokenizerSchema> {
  if (tokenizerJson !== undefined) {
    return check(tokenizerSchema, parseJson(tokenizerJson, 'tokenizer.json'), 'tokenizer.json');
  }
  if (vocabJson === undefined || mergesTxt === undefined) {
    throw new ClusterError(
      'failed_precondition',
      'no tokenizer: neither tokenizer.json nor vocab.json with merges.txt',
    );
  }
  const vocab = parseJson(vocabJson, 'vocab.json');
  const merges = mergesTxt.split(/\r?\n/u).filter((line) => line !== '' && !line.startsWith('#version'));
  return check(
    tokenizerSchema,
    { ...qwen2Steps, model: { type: 'BPE', vocab, merges } },
    'vocab.json with merges.txt',
  );
}

async function readOptional(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') {
      return undefined;
    }
    throw new ClusterError('unavailable', `cannot read ${path}`, { cause: error });
  }
}

function parseJson(json: string, file: string): unknown {
  try {
    return JSON.parse(json);
  } catch (cause) {
    throw new ClusterError('data_loss', `${file} is not JSON`, { cause });
  }
}

/** Names the place and the kind of the wrong value. The file may not be a tokenizer at all, so it is never quoted. */
function check<Schema extends z.ZodType>(schema: Schema, value: unknown, file: string): z.output<Schema> {
  const result = schema.safeParse(value, { reportInput: true });
  if (result.success) {
    return result.data;
  }
  const { issues } = result.error;
  const unsupported = issues.find(({ code }) => code === 'invalid_value');
  const problem = unsupported ?? issues[0]!;
  const place = placeOf(problem.path);
  const text = `${place} (${kindOf(problem.input)}): ${problem.message}`;
  throw unsupported === undefined
    ? new ClusterError('data_loss', `${file} is malformed: ${text}`)
    : new ClusterError('failed_precondition', `${file} is not supported: ${text}`);
}

/** Fields whose keys are the file's own. */
const records = new Set<PropertyKey | undefined>(['vocab', 'added_tokens_decoder']);

function placeOf(path: readonly PropertyKey[]): string {
  const names = path.map((name, index) => (records.has(path[index - 1]) ? '*' : String(name)));
  return names.join('.') || 'top level';
}

function kindOf(value: unknown): string {
  if (value === undefined) {
    return 'absent';
  }
  if (value === null) {
    return 'null';
  }
  return Array.isArray(value) ? 'a list' : `of type ${typeof value}`;
}
