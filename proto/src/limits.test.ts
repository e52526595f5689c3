import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import { createFileRegistry, fromBinary, type DescMessage } from '@bufbuild/protobuf';
import { FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  describeLimit,
  numberProblem,
  repeatedLimits,
  requestLimits,
  samplingLimits,
  stopTextMaxCharacters,
  type MessageLimits,
  type NumberLimit,
} from './limits.ts';

const limits: [string, NumberLimit][] = Object.entries(samplingLimits);

/** The comment above each field of SamplingParams, on one line. */
function commentsOf(file: string): Map<string, string> {
  const text = readFileSync(join(import.meta.dirname, '../mimo', file), 'utf8');
  const fields = text.matchAll(/((?: {2}\/\/.*\n)+) {2}(?:optional|repeated) \w+ (\w+) =/g);
  return new Map([...fields].map(([, comment, name]) => [name!, comment!.replaceAll(/\n? {2}\/\/ /g, ' ')]));
}

describe('samplingLimits', () => {
  const comments = commentsOf('inference/v1/sampling.proto');

  it.each(limits)('of %s are those that the proto names', (name, limit) => {
    const field = name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    expect(comments.get(field)).toContain(describeLimit(limit));
  });

  it('of repeated fields are those that the proto names', () => {
    expect(comments.get('stop')).toContain(
      `At most ${repeatedLimits.stop}, each of 1 to ${stopTextMaxCharacters} characters.`,
    );
    expect(comments.get('stop_token_ids')).toContain(`At most ${repeatedLimits.stopTokenIds}.`);
  });

  it('keep logits that are finite and healthy finite in 32 bits', () => {
    const { temperature, repetitionPenalty, frequencyPenalty, presencePenalty } = samplingLimits;
    const longestContext = 2 ** 20;
    const penalised = 1e30 / Math.fround(repetitionPenalty.min);
    const added = frequencyPenalty.max * longestContext + presencePenalty.max;
    expect(Math.fround((penalised + added) / Math.fround(temperature.min))).toBeLessThan(Infinity);
  });
});

/** Where limits and proto differ: every repeated field has a count, every limit names its field as the proto does. */
function differences(message: DescMessage, given: MessageLimits): string[] {
  const numbers = new Set(message.fields.map(({ number }) => number));
  const unknown = Object.keys(given).filter((number) => !numbers.has(Number(number)));
  return [
    ...unknown.map((number) => `${message.typeName} has no field ${number}`),
    ...message.fields.flatMap((field) => {
      const limit = given[field.number];
      const agrees =
        (limit?.maxCount !== undefined) === (field.fieldKind === 'list') &&
        (limit?.name ?? field.name) === field.name &&
        (limit?.message !== undefined) === (field.message !== undefined);
      const inner = field.message === undefined ? [] : differences(field.message, limit?.message ?? {});
      return [...(agrees ? [] : [`${message.typeName}.${field.name}`]), ...inner];
    }),
  ];
}

describe('requestLimits', () => {
  const file = readFileSync(join(import.meta.dirname, 'gen/descriptor.binpb'));
  const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, file));

  it.each(Object.entries<MessageLimits>(requestLimits))('of %s agree with the proto', (name, given) => {
    expect(differences(registry.getMessage(`mimo.inference.v1.${name}`)!, given)).toEqual([]);
  });

  it('name every request of the service', () => {
    const { methods } = registry.getService('mimo.inference.v1.InferenceService')!;
    expect(Object.keys(requestLimits).toSorted()).toEqual(methods.map(({ input }) => input.name).toSorted());
  });
});

describe('numberProblem', () => {
  it.each(limits)('accepts %s at both ends, in 32 bits too, and nothing beyond', (_, limit) => {
    const { min, max, kind, minExcluded, orZero } = limit;
    const step = kind === 'integer' ? 1 : 1e-6 * Math.max(1, Math.abs(max));
    expect(numberProblem(max, limit)).toBeUndefined();
    expect(numberProblem(max + step, limit)).toBe(`must be ${describeLimit(limit)}, not ${max + step}`);
    expect(numberProblem(min, limit) === undefined).toBe(minExcluded !== true);
    expect(numberProblem(Math.fround(min), limit) === undefined).toBe(minExcluded !== true);
    // Below the number before `min` in 32 bits; where 0 is accepted beside the range, this lies between the two.
    expect(
      numberProblem(kind === 'integer' ? min - 1 : min - 1e-7 * Math.max(min, 1e-3), limit),
    ).toBeDefined();
    expect(numberProblem(0, limit) === undefined).toBe(orZero === true || (min <= 0 && minExcluded !== true));
    for (const strange of [NaN, Infinity, -Infinity, 2 ** 32]) {
      expect(numberProblem(strange, limit)).toBeDefined();
    }
  });

  it('accepts what lies within and nothing else, whatever the bits', () => {
    const anyFloat = fc.nat(0xffff_ffff).map((bits) => new Float32Array(Uint32Array.of(bits).buffer)[0]!);
    fc.assert(
      fc.property(anyFloat, fc.constantFrom(...limits), (value, [, limit]) => {
        const { min, max, kind, minExcluded, orZero } = limit;
        const isWithin = Math.fround(min) <= value && value <= max && (minExcluded !== true || value !== min);
        const isAccepted =
          (isWithin && (kind === 'float' || Number.isInteger(value))) || (orZero === true && value === 0);
        expect(numberProblem(value, limit) === undefined).toBe(isAccepted);
      }),
    );
  });
});
