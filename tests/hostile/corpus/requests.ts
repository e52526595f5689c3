// Requests that are wrong as a whole: no model, no input, a model that no group serves.

import { Role } from '@mimo/proto/inference';

import { frame } from '../raw-call.ts';
import type { HostileSubject } from '../hostile-case.ts';

const path = '/mimo.inference.v1.InferenceService';
const question = { messages: [{ role: Role.USER, content: 'What is 47 + 85?' }] };

export const requests: HostileSubject = {
  name: 'requests',
  cases: [
    {
      name: 'a chat without a model',
      send: (world) => world.chat({ ...question, model: '' }),
      code: ['invalid_argument', 'not_found'],
    },
    {
      name: 'a model that nobody serves',
      send: (world) => world.chat({ ...question, model: 'gpt-9' }),
      code: 'not_found',
      message: /gpt-9/,
    },
    {
      name: 'a chat without messages',
      send: (world) => world.chat({ messages: [] }),
      code: 'invalid_argument',
      message: /messages/,
    },
    {
      name: 'a generation without input',
      send: (world) => world.generate({}),
      code: 'invalid_argument',
      message: /input|prompt/,
    },
    {
      name: 'a wrong key',
      send: (world) =>
        world.raw({
          path: `${path}/ListModels`,
          body: frame(new Uint8Array()),
          headers: { authorization: 'Bearer nobody' },
        }),
      code: 'unauthenticated',
    },
    {
      name: 'a method that does not exist',
      send: (world) => world.raw({ path: `${path}/Guess`, body: frame(new Uint8Array()) }),
      code: 'unimplemented',
    },
  ],
};
