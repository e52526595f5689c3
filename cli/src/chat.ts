// `mimo chat`: asks one question (argument or standard input) or talks (a terminal and no question). Streams the
// thinking dimmed and the answer plainly, then the figures. Owns the conversation's history; sees tokens only as a
// count.

import { createInterface } from 'node:readline/promises';
import { text } from 'node:stream/consumers';
import { parseArgs } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';
import { Role, type Finish, type Message } from '@mimo/proto/inference';
import { SamplingParams } from '@mimo/proto/sampling';

import { Connection, chooseModel, defaultAddress } from './connection.ts';
import { note, noteError, printable, styled } from './terminal.ts';

export const chatHelp = `mimo chat [QUESTION] [options]
  Without QUESTION: reads it from standard input, or starts a conversation on a terminal.
  --model NAME         default: the first model with a ready group
  --system TEXT        a system message
  --temperature NUMBER 0 is greedy; default: the model's 0.6
  --seed NUMBER        the same seed gives the same answer
  --max-tokens NUMBER  default: up to the end of the context
  --no-speculation     turn off drafts: the same answer, slower
  --address HOST:PORT  default: ${defaultAddress}
  --api-key KEY        default: $MIMO_API_KEY`;

function numberFrom(name: string, value: string | undefined): number | undefined {
  if (value === undefined) {
    return undefined;
  }
  const number = Number(value);
  if (value.trim() === '' || !Number.isFinite(number)) {
    throw new ClusterError('invalid_argument', `--${name} must be a number, not '${value}'`);
  }
  return number;
}

function naturalFrom(name: string, value: string | undefined): number | undefined {
  if (value !== undefined && !(/^\d+$/.test(value) && Number(value) < 2 ** 32)) {
    throw new ClusterError('invalid_argument', `--${name} must be a whole number below 2^32, not '${value}'`);
  }
  return value === undefined ? undefined : Number(value);
}

/** Runs the command; resolves with the exit code. */
export async function runChat(argv: readonly string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parseArgs({
    args: [...argv],
    allowPositionals: true,
    options: {
      model: { type: 'string' },
      system: { type: 'string' },
      temperature: { type: 'string' },
      seed: { type: 'string' },
      'max-tokens': { type: 'string' },
      'no-speculation': { type: 'boolean', default: false },
      address: { type: 'string', default: defaultAddress },
      'api-key': { type: 'string' },
    },
  });
  const sampling = SamplingParams.fromPartial({
    temperature: numberFrom('temperature', values.temperature),
    seed: naturalFrom('seed', values.seed),
    maxTokens: naturalFrom('max-tokens', values['max-tokens']),
    draftTokens: values['no-speculation'] ? 0 : undefined,
  });
  const history: Message[] =
    values.system === undefined ? [] : [{ role: Role.SYSTEM, content: values.system }];
  const connection = new Connection(values.address, values['api-key'] ?? process.env['MIMO_API_KEY']);
  try {
    const model = await chooseModel(connection, values.model, signal);
    const talk: Talk = { connection, model, sampling, history };
    const isTalk = positionals.length === 0 && process.stdin.isTTY;
    if (isTalk) {
      await converse(talk, signal);
    } else {
      await ask(
        talk,
        positionals.length > 0 ? positionals.join(' ') : (await text(process.stdin)).trim(),
        signal,
      );
    }
    return 0;
  } finally {
    connection.close();
  }
}

interface Talk {
  readonly connection: Connection;
  readonly model: string;
  readonly sampling: SamplingParams;
  /** Grows by a question and its answer each time. */
  readonly history: Message[];
}

/**
 * Questions from the terminal until end of file. Ctrl-C stops the current answer; without one it ends the
 * conversation.
 */
async function converse(talk: Talk, signal: AbortSignal): Promise<void> {
  note(styled('dim', `${talk.model}: Ctrl-C stops an answer, Ctrl-D leaves`));
  const terminal = createInterface({
    input: process.stdin,
    output: process.stderr,
    prompt: styled('bold', '> '),
  });
  let answering: AbortController | undefined;
  terminal.on('SIGINT', () => {
    if (answering === undefined) {
      terminal.close();
    } else {
      answering.abort(new ClusterError('canceled', 'stopped'));
    }
  });
  signal.addEventListener('abort', () => terminal.close(), { once: true });
  terminal.prompt();
  for await (const line of terminal) {
    if (line.trim() !== '') {
      answering = new AbortController();
      try {
        await ask(talk, line, AbortSignal.any([answering.signal, signal]));
      } catch (error) {
        noteError(ClusterError.from(error).message);
      }
      answering = undefined;
    }
    terminal.prompt();
  }
  note('');
}

/** Asks and streams the answer. A failed question leaves no trace in the history. */
async function ask(talk: Talk, question: string, signal: AbortSignal): Promise<void> {
  const { connection, model, sampling, history } = talk;
  const messages = [...history, { role: Role.USER, content: question }];
  const begin = performance.now();
  let firstTokenMs: number | undefined;
  let answer = '';
  let thinking = '';
  let isThinking = false;
  for await (const { event } of connection.chat({ model, messages, sampling }, signal)) {
    if (event?.$case === 'delta') {
      firstTokenMs ??= performance.now() - begin;
      const { reasoning, text: answerText } = event.value;
      if (reasoning !== '') {
        isThinking = true;
        thinking += reasoning;
        process.stderr.write(styled('dim', printable(reasoning)));
      }
      if (answerText !== '') {
        if (isThinking) {
          isThinking = false;
          process.stderr.write('\n\n');
        }
        answer += answerText;
        process.stdout.write(printable(answerText));
      }
    } else if (event?.$case === 'finish') {
      process.stdout.write(answer.endsWith('\n') ? '' : '\n');
      note(styled('dim', figures(event.value, firstTokenMs ?? 0, performance.now() - begin)));
    }
  }
  // MiMo's template keeps earlier reasoning, so the model is used to seeing it.
  const content = thinking === '' ? answer : `<think>\n${thinking}\n</think>\n${answer}`;
  history.push({ role: Role.USER, content: question }, { role: Role.ASSISTANT, content });
}

/** The closing line: tokens, speed over the whole time, time to the first token, accepted drafts. */
export function figures(finish: Finish, firstTokenMs: number, totalMs: number): string {
  const tokens = finish.usage?.completionTokens ?? 0;
  const parts = [`${tokens} token${tokens === 1 ? '' : 's'}`];
  if (totalMs > 0) {
    parts.push(`${((tokens * 1000) / totalMs).toFixed(0)} tokens/s`);
  }
  parts.push(`first token after ${(firstTokenMs / 1000).toFixed(2)} s`);
  const { draftedTokens, acceptedTokens } = finish.speculation ?? { draftedTokens: 0, acceptedTokens: 0 };
  if (draftedTokens > 0) {
    const ratio = ((100 * acceptedTokens) / draftedTokens).toFixed(0);
    parts.push(`drafts accepted ${acceptedTokens} of ${draftedTokens} (${ratio} %)`);
  }
  return parts.join(', ');
}
