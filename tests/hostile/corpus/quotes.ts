// A model whose chat template quotes the prompt in its errors, in every way that the template language has. The caller
// may read its own quoted words in its status; hostile.test.ts searches for them everywhere else.

import { cp, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { Role } from '@mimo/proto/inference';

import type { HostileSubject } from '../hostile-case.ts';

/** In every prompt that the template quotes. */
export const quotedMarker = 'marker in a quoted prompt b81c';

const model = 'quoting-template';
const demo = join(import.meta.dirname, '../../../models/mimo-demo');

/** The system message names the way; `t` is the last message. */
const ways: Readonly<Record<string, string>> = {
  'an exception': '{{ raise_exception(t) }}',
  'an exception with all messages': '{{ raise_exception(messages | tojson) }}',
  'an exception at the end of a longer text': "{{ raise_exception('no talk of this kind here: ' ~ t) }}",
  'a keyword of a macro': '{% macro m() %}{% endmacro %}{{ m(**{t: 1}) }}',
  'a test named so': "{{ [{'a': t}] | selectattr('a', t) | list }}",
  'a missing member that is called': '{{ messages[t].x() }}',
  'a member of a text': '{{ t.nothing.at.all() }}',
  'the text called': '{{ t() }}',
  'the text as a number': '{{ t - 1 }}',
  'JSON of it': '{{ [t] | tojson(indent=t) }}',
  'a range': '{{ range(t) }}',
  'a format of time': '{{ strftime_now(t) }}',
  'a loop over it': '{% for a, b in t %}{% endfor %}',
  'a replacement': '{{ t.replace(t, 1, 2, 3) }}',
  'an indentation': '{{ t | indent(t) }}',
};

const template = `
{%- set t = messages[-1].content -%}
${Object.entries(ways)
  .map(([way, quoting]) => `{%- if messages[0].content == '${way}' %}${quoting}{% endif -%}`)
  .join('\n')}
<|im_start|>{{ t }}<|im_end|>`;

export const quotes: HostileSubject = {
  name: 'templates that quote',
  writeModels: async (directory) => {
    const place = join(directory, model);
    await cp(demo, place, { recursive: true, filter: (path) => !path.endsWith('.safetensors') });
    await writeFile(join(place, 'chat_template.jinja'), template);
    return { [model]: place };
  },
  cases: Object.keys(ways).map((way) => ({
    name: way,
    send: async (world) =>
      world.countTokens({
        request: {
          $case: 'chat',
          value: {
            model,
            messages: [
              { role: Role.SYSTEM, content: way },
              { role: Role.USER, content: quotedMarker },
            ],
          },
        },
      }),
    // Some ways do not fail in every version of the template language.
    code: ['invalid_argument', 'failed_precondition', 'ok'],
    quotes: true,
  })),
};
