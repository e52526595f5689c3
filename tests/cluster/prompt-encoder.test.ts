// A model's prompt readers: real processes, with files that are right, wrong, endless or explosive.

import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { createLog } from '@mimo/core/process/log';
import type { PromptInput } from '@mimo/gateway/admission/prompt-input';
import { loadPromptEncoder, type PromptEncoder } from '@mimo/gateway/prompts/prompt-encoder';
import { Message, Role } from '@mimo/proto/inference';
import { loadTokenizer, TooManyTokensError } from '@mimo/tokenizer';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

const demo = join(import.meta.dirname, '../../models/mimo-demo');
const tokenizer = await loadTokenizer(demo);
const long = 'What is 47 + 85? '.repeat(5_000);
const text = (given: string): PromptInput => ({ kind: 'text', text: given });
const chat = (content: string): PromptInput => ({
  kind: 'chat',
  messages: [Message.fromPartial({ role: Role.USER, content })],
});

let root: string;
const open: PromptEncoder[] = [];
const failures: { model: string; cause: string }[] = [];
const logged: string[] = [];

beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'mimo-prompts-'));
});

afterEach(async () => {
  await Promise.all(open.splice(0).map((encoder) => encoder.close()));
  failures.length = 0;
  logged.length = 0;
});

afterAll(() => rm(root, { recursive: true, force: true }));

async function openEncoder(
  directory: string,
  { maxReaders = 2, timeoutMs = 60_000, model = 'm' } = {},
): Promise<PromptEncoder> {
  const log = createLog({
    process: 'test',
    level: 'info',
    destination: { write: (line: string) => void logged.push(line) },
  });
  const encoder = await loadPromptEncoder(model, directory, {
    maxReaders,
    timeoutMs,
    metrics: { promptTime: () => undefined, promptFailures: (labels) => failures.push(labels) },
    log,
  });
  open.push(encoder);
  return encoder;
}

/** The demonstration model with another template, or another pattern of its tokenizer. */
async function writeModel(
  name: string,
  { template, pattern }: { readonly template?: string; readonly pattern?: string },
): Promise<string> {
  const directory = join(root, name);
  await cp(demo, directory, { recursive: true, filter: (path) => !path.endsWith('.safetensors') });
  if (template !== undefined) {
    await writeFile(join(directory, 'chat_template.jinja'), template);
  }
  if (pattern !== undefined) {
    const json = JSON.parse(await readFile(join(demo, 'tokenizer.json'), 'utf8'));
    json.pre_tokenizer.pretokenizers[0].pattern.Regex = pattern;
    await writeFile(join(directory, 'tokenizer.json'), JSON.stringify(json));
  }
  return directory;
}

const ask = (
  encoder: PromptEncoder,
  input: PromptInput,
  { tenant = 't', maxTokens = Infinity, signal = new AbortController().signal } = {},
): ReturnType<PromptEncoder['encode']> => encoder.encode(input, { tenant, maxTokens, signal });

describe('PromptEncoder', () => {
  it('returns the tokenizer’s ids, and its table', async () => {
    const encoder = await openEncoder(demo);
    const raw = `<|im_start|>${long}`;
    const { tokenIds } = await ask(encoder, text(raw));
    expect(tokenIds).toEqual(tokenizer.encode(raw, { allowSpecial: true }));
    expect(encoder.tokenTable.specialTokens).toEqual(tokenizer.specialTokens);
    expect((await ask(encoder, chat('<|im_end|>'))).tokenIds).not.toEqual(
      (await ask(encoder, chat(''))).tokenIds,
    );
    expect(await ask(encoder, { kind: 'tokens', tokenIds: [1, 2] })).toEqual({ tokenIds: [1, 2], begun: '' });
  });

  it('answers short prompts before earlier long ones, of any tenant', async () => {
    const encoder = await openEncoder(demo);
    await ask(encoder, text(long));
    const order: string[] = [];
    const note = async (name: string, input: PromptInput, tenant: string): Promise<void> => {
      await ask(encoder, input, { tenant });
      order.push(name);
    };
    const slow = '日本語'.repeat(100_000);
    await Promise.all([
      ...Array.from({ length: 4 }, () => note('long', text(slow), 'a')),
      note('short', text('x'), 'a'),
      note('short', text('x'), 'b'),
    ]);
    expect(order.slice(0, 3).filter((name) => name === 'short')).toHaveLength(2);
  });

  it('does not read a prompt that cannot fit, and stops once a prompt exceeds the limit', async () => {
    const encoder = await openEncoder(demo);
    for (const input of [text('a'.repeat(1_000_000)), text(long), chat(long)]) {
      const refused = await ask(encoder, input, { maxTokens: 100 }).catch((error: unknown) => error);
      expect(refused).toBeInstanceOf(TooManyTokensError);
    }
  });

  it('does not read a prompt that was cancelled while it waited', async () => {
    const encoder = await openEncoder(demo, { maxReaders: 1 });
    const stop = new AbortController();
    const first = ask(encoder, text(long));
    const second = ask(encoder, text(long), { signal: stop.signal });
    stop.abort(new Error('gone'));
    await expect(second).rejects.toThrow('gone');
    expect((await first).tokenIds.length).toBeGreaterThan(1_000);
    await expect(ask(encoder, text('x'), { signal: stop.signal })).rejects.toThrow('gone');
  });

  it('retires once the waiting prompts have been read', async () => {
    const encoder = await openEncoder(demo);
    const asked = ['a', 'b', 'c'].map((tenant) => ask(encoder, text(long), { tenant }));
    await encoder.retire();
    for (const { tokenIds } of await Promise.all(asked)) {
      expect(tokenIds.length).toBeGreaterThan(1_000);
    }
    await expect(ask(encoder, text('x'))).rejects.toMatchObject({ code: 'unavailable' });
  });

  it('refuses prompts over the limit of waiting ones, and serves other tenants meanwhile', async () => {
    const encoder = await openEncoder(demo);
    const block = 'x '.repeat(2 ** 19);
    const asked = Array.from({ length: 40 }, () =>
      ask(encoder, text(block)).then(
        () => 'read',
        ({ code }) => code,
      ),
    );
    await expect(ask(encoder, text('x'), { tenant: 'b' })).resolves.toMatchObject({
      tokenIds: expect.any(Array),
    });
    await encoder.close();
    const codes = new Set(await Promise.all(asked));
    expect(codes).toContain('resource_exhausted');
    expect(codes).toContain('unavailable');
  });

  it.each([
    ['a lone surrogate', text(`${long}\ud800`), 'invalid_argument'],
    ['a lone surrogate in a message', chat('\udc00'), 'invalid_argument'],
  ])('rejects %s with the reader’s error', async (_, input, code) => {
    const encoder = await openEncoder(demo);
    await expect(ask(encoder, input)).rejects.toMatchObject({ code });
  });

  it('fails to load a model with missing or broken files', async () => {
    await expect(openEncoder(root)).rejects.toMatchObject({ code: 'failed_precondition' });
    const broken = await writeModel('broken-template', { template: '{% if %}' });
    await expect(openEncoder(broken)).rejects.toMatchObject({
      code: 'failed_precondition',
      message: 'the chat template does not parse',
    });
  });
});

describe('PromptEncoder of a bad model', () => {
  const loop = '{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}';
  const onDemand = `{% if messages[-1].content == 'bad' %}BAD{% endif %}{{ messages[-1].content }}`;
  const timeoutMs = 1_500;

  it.each<[string, { template?: string; pattern?: string }, PromptInput, RegExp]>([
    [
      'a template that loops',
      { template: onDemand.replace('BAD', loop) },
      chat('bad'),
      /its chat template did not finish within/,
    ],
    [
      'a pattern that explodes',
      { pattern: '(?:a+)+$|\\\\p{L}+|[^a]' },
      text(`${'a'.repeat(200)}!`),
      /its tokenizer did not finish within/,
    ],
  ])(
    'ends %s, tells the caller, the log and the metric, and reads the next prompt',
    async (name, files, bad, message) => {
      const encoder = await openEncoder(await writeModel(name.replaceAll(' ', '-'), files), {
        timeoutMs,
        model: name,
      });
      await expect(ask(encoder, bad)).rejects.toMatchObject({
        code: 'failed_precondition',
        message: expect.stringMatching(message),
      });
      expect(failures).toEqual([{ model: name, cause: 'timeout' }]);
      expect(logged.join('')).toContain(name);
      await expect(ask(encoder, chat('good'))).resolves.toMatchObject({ tokenIds: expect.any(Array) });
    },
  );

  it.each([
    [
      'a list that doubles',
      '{% set n = namespace(x=[1]) %}{% for a in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}',
    ],
    ['a range of a billion', '{% for a in range(1000000000) %}{% endfor %}'],
    [
      'a text that doubles',
      "{% set n = namespace(x='ab') %}{% for a in range(40) %}{% set n.x = (n.x ~ n.x) | upper %}{% endfor %}{{ n.x }}",
    ],
  ])('survives %s', async (name, template) => {
    const directory = await writeModel(name.replaceAll(' ', '-'), {
      template: onDemand.replace('BAD', template),
    });
    const encoder = await openEncoder(directory, { timeoutMs: 20_000 });
    await expect(ask(encoder, chat('bad'))).rejects.toMatchObject({ code: 'failed_precondition' });
    await expect(ask(encoder, chat('good'))).resolves.toMatchObject({ tokenIds: expect.any(Array) });
  });

  it('logs the place of a tokenizer’s failure without quoting the prompt', async () => {
    const pattern = '(?:(a)|(b)|(c))+$|\\p{L}+|[^a]';
    const directory = await writeModel('pattern-overflows', { pattern });
    const encoder = await openEncoder(directory, { model: 'overflows' });
    await expect(ask(encoder, text(`${'a'.repeat(4_000_000)}marker`))).rejects.toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('model overflows cannot read this prompt: its tokenizer failed'),
    });
    expect(failures).toEqual([{ model: 'overflows', cause: 'crash' }]);
    expect(logged.join('')).toMatch(/"model":"overflows".*RangeError at [\w-]+\.ts:\d+:\d+: withheld/);
    expect(logged.join('')).not.toContain('aaaa');
    await expect(ask(encoder, text('good'))).resolves.toMatchObject({ begun: '' });
  });

  it('does not delay the prompts of other tenants for longer than the limit', async () => {
    const directory = await writeModel('loop-for-others', { template: onDemand.replace('BAD', loop) });
    const encoder = await openEncoder(directory, { timeoutMs });
    const bad = ask(encoder, chat('bad'), { tenant: 'a' }).catch(({ code }) => code);
    await expect(ask(encoder, chat('good'), { tenant: 'b' })).resolves.toMatchObject({ begun: '' });
    expect(await bad).toBe('failed_precondition');
  });
});
