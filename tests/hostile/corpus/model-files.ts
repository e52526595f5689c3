// Models whose chat template or tokenizer loops, explodes, fills the memory or makes no sense. They are served beside
// the demonstration model, whose callers must not notice. No group runs them, so readable prompts are only counted.

import { cp, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { Role, type Message } from '@mimo/proto/inference';

import type { HostileSubject } from '../hostile-case.ts';
import type { CallEnd } from '../raw-call.ts';
import type { HostileWorld } from '../world.ts';

const demo = join(import.meta.dirname, '../../../models/mimo-demo');

/** The message chooses what the template does, so that one model serves several cases. */
const template = `
{%- set text = messages[-1].content -%}
{%- set held = namespace(list=[1, 1], text='ab') -%}
{%- if text == 'loop' %}{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}{% endif -%}
{%- if text == 'list' %}{% for a in range(60) %}{% set held.list = held.list + held.list %}{% endfor %}{% endif -%}
{%- if text == 'range' %}{% for a in range(1000000000) %}{% endfor %}{% endif -%}
{%- if text == 'text' %}{% for a in range(60) %}{% set held.text = (held.text ~ held.text) | upper %}{% endfor %}{% endif -%}
{%- if text == 'nested' %}{% for a in range(50000) %}{% set held.list = [held.list] %}{% endfor %}{{ held.list | tojson }}{% endif -%}
{%- if text == 'refuse' %}{{ raise_exception('no such talk here') }}{% endif -%}
{%- if text == 'refuse at length' %}{{ raise_exception('no ' * 100000) }}{% endif -%}
{%- if text == 'wrong' %}{{ text.nothing.at.all() }}{% endif -%}
{%- if text == 'filter' %}{{ text | frobnicate }}{% endif -%}
{%- if text != 'nothing' and messages[-1].role != 'assistant' %}<|im_start|>{{ text }}<|im_end|>{% endif -%}
`;
/** Exponential on letters a with something else behind them. */
const explodingPattern = '(?:a+)+$|\\p{L}+|\\P{L}';

const chat = (model: string, ...messages: readonly Message[]) => ({ model, messages: [...messages] });
const user = (content: string): Message => ({ role: Role.USER, content });

/** Counts the tokens of a chat with a bad model. */
function count(world: HostileWorld, model: string, ...messages: readonly Message[]): Promise<CallEnd> {
  return world.countTokens({ request: { $case: 'chat', value: chat(model, ...messages) } });
}

/** A chat with the demonstration model, while a bad one is being asked. */
async function askBeside(world: HostileWorld, text: string): Promise<CallEnd> {
  const bad = count(world, 'bad-template', user(text));
  const good = await world.chat({ messages: [user('What is 6 * 7?')], sampling: { maxTokens: 5 } });
  const { code } = await bad;
  return code === 'failed_precondition' ? good : { code, message: 'the bad model did not fail' };
}

async function expectNamed(world: HostileWorld, sought: readonly RegExp[], pages: string): Promise<CallEnd> {
  const missing = sought.filter((pattern) => !pattern.test(pages));
  return missing.length === 0
    ? { code: 'ok', message: '' }
    : { code: 'internal', message: `no ${missing.join(', ')}` };
}

export const modelFiles: HostileSubject = {
  name: 'model files',
  writeModels: async (directory) => {
    const places = {
      'bad-template': join(directory, 'bad-template'),
      'bad-pattern': join(directory, 'bad-pattern'),
    };
    for (const place of Object.values(places)) {
      await cp(demo, place, { recursive: true, filter: (path) => !path.endsWith('.safetensors') });
    }
    await writeFile(join(places['bad-template'], 'chat_template.jinja'), template);
    const tokenizer = JSON.parse(await readFile(join(demo, 'tokenizer.json'), 'utf8'));
    tokenizer.pre_tokenizer.pretokenizers[0].pattern.Regex = explodingPattern;
    await writeFile(join(places['bad-pattern'], 'tokenizer.json'), JSON.stringify(tokenizer));
    return places;
  },
  cases: [
    {
      name: 'a template that loops',
      send: (world) => count(world, 'bad-template', user('loop')),
      code: 'failed_precondition',
      message: /model bad-template cannot read this prompt: its chat template did not finish within 4000 ms/,
    },
    {
      name: 'a template that loops, while others chat',
      send: (world) => askBeside(world, 'loop'),
      code: 'ok',
    },
    {
      name: 'a template that loops, as a chat',
      send: (world) => world.chat(chat('bad-template', user('loop'))),
      code: 'failed_precondition',
      message: /its chat template did not finish/,
    },
    ...['list', 'range', 'text'].map((text) => ({
      name: `a template that fills the memory with one ${text}`,
      send: (world: HostileWorld) => count(world, 'bad-template', user(text)),
      code: 'failed_precondition' as const,
      message: /bad-template|the chat template fails/,
    })),
    {
      name: 'a template that prints what is nested without end',
      send: (world) => count(world, 'bad-template', user('nested')),
      code: ['failed_precondition', 'invalid_argument'],
    },
    {
      name: 'a template that refuses',
      send: (world) => count(world, 'bad-template', user('refuse')),
      code: 'invalid_argument',
      message: /the chat template refuses the messages: no such talk here/,
    },
    {
      name: 'a template that refuses at length',
      send: (world) => count(world, 'bad-template', user('refuse at length')),
      code: 'invalid_argument',
      message: /^.{1,2000}$/s,
    },
    ...['wrong', 'filter'].map((text) => ({
      name: `a template with a mistake: ${text}`,
      send: (world: HostileWorld) => count(world, 'bad-template', user(text)),
      code: 'invalid_argument' as const,
      message: /the chat template refuses/,
    })),
    {
      name: 'a template that prints nothing',
      send: (world) => world.chat(chat('bad-template', user('nothing'))),
      code: 'invalid_argument',
      message: /messages produces no tokens/,
    },
    {
      name: 'a template that leaves out the message to be continued',
      send: (world) => count(world, 'bad-template', user('x'), { role: Role.ASSISTANT, content: 'so' }),
      code: 'invalid_argument',
      message: /leaves out the last message/,
    },
    {
      name: 'the same template, which reads what it can',
      send: (world) => count(world, 'bad-template', user('x')),
      code: 'ok',
    },
    {
      name: 'a pattern that explodes',
      send: (world) => count(world, 'bad-pattern', user(`${'a'.repeat(200)}!`)),
      code: 'failed_precondition',
      message: /model bad-pattern cannot read this prompt: its tokenizer did not finish within 4000 ms/,
    },
    {
      name: 'the same pattern, which reads what it can',
      send: (world) => count(world, 'bad-pattern', user('good!')),
      code: 'ok',
    },
    {
      name: 'the log names the models',
      send: async (world) =>
        expectNamed(
          world,
          [/"model":"bad-template".*took too long/, /"model":"bad-pattern".*took too long/],
          [...(await world.readLogs()).values()].join('\n'),
        ),
      code: 'ok',
    },
    {
      name: 'the metric names the models',
      send: async (world) =>
        expectNamed(
          world,
          ['bad-template', 'bad-pattern'].map(
            (model) => new RegExp(`gateway_prompt_failures_total\\{[^}]*model="${model}"`),
          ),
          await world.readMetrics(),
        ),
      code: 'ok',
    },
  ],
};
