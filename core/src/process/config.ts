// Environment variables -> one frozen, complete configuration. Owns the parsing of durations, sizes, addresses and
// lists, the unknown-variable check, and the rule that all problems come in one error. Each process keeps its table of
// settings, with defaults and their reasons, in its own config.ts; only its main.ts passes the environment.
//
// Not with zod, which reads our JSON files: a setting is one regular expression either way, and what makes this file is
// not in zod (names of variables, masked secrets, unknown variables, defaults as text for the reference). With it the
// file would have about 255 lines instead of 270, and every process would load the library.

import { ClusterError } from './errors.ts';

/** One setting: its variable, how its text is read, and its default as text (undefined: it must be given). */
export interface Setting<T> {
  readonly variable: string;
  readonly fallback: string | undefined;
  readonly parse: (text: string) => T;
  readonly secret: boolean;
  /** Removes secrets from the text, or from an entry of a list, for printing. */
  readonly redact?: (text: string) => string;
}

export type Settings = Readonly<Record<string, Setting<unknown>>>;

/** What a table of settings compiles to. */
export type ConfigOf<Table extends Settings> = {
  readonly [Key in keyof Table]: Table[Key] extends Setting<infer Value> ? Value : never;
};

/** The environment, as `process.env` has it. */
export type Environment = Readonly<Record<string, string | undefined>>;

/** How a process's environment is read. */
export interface ConfigRules<Table extends Settings> {
  /** Such as `MIMO_GATEWAY_`: an unknown variable that begins with it is a problem. */
  readonly prefix: string;
  readonly settings: Table;
  /** Checks across fields: one line a problem. */
  readonly check?: (config: ConfigOf<Table>) => readonly string[];
}

// Kubernetes puts such variables into every pod for each Service; a Service named like a process would be "unknown".
const serviceLink = /_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)$/;

/**
 * Reads the environment by the rules. Fails with `invalid_argument` and lists every problem, one a line: missing
 * settings, unreadable ones (name, expectation, value; secrets as ***), unknown ones, contradictions.
 */
export function parseConfig<Table extends Settings>(
  rules: ConfigRules<Table>,
  env: Environment,
): ConfigOf<Table> {
  const problems: string[] = [];
  const values: Record<string, unknown> = {};
  for (const [key, setting] of Object.entries(rules.settings)) {
    const text = env[setting.variable] || setting.fallback;
    if (text === undefined) {
      problems.push(`${setting.variable} is missing`);
      continue;
    }
    try {
      values[key] = setting.parse(text);
    } catch (error) {
      const shown = setting.secret ? '***' : JSON.stringify(setting.redact?.(text) ?? text);
      problems.push(`${setting.variable} ${ClusterError.from(error).message}, not ${shown}`);
    }
  }
  const known = new Set(Object.values(rules.settings).map((setting) => setting.variable));
  for (const [name, value] of Object.entries(env)) {
    const link = serviceLink.test(name) || (name.endsWith('_PORT') && value?.includes('://') === true);
    if (name.startsWith(rules.prefix) && !known.has(name) && !link) {
      problems.push(`${name} is not a setting of this process`);
    }
  }
  const config = Object.freeze(values) as ConfigOf<Table>;
  if (problems.length === 0) {
    problems.push(...(rules.check?.(config) ?? []));
  }
  if (problems.length > 0) {
    throw new ClusterError('invalid_argument', `invalid configuration:\n  ${problems.join('\n  ')}`);
  }
  return config;
}

/** The configuration as it may be printed: secrets as ***. */
export function printableConfig<Table extends Settings>(
  settings: Table,
  config: ConfigOf<Table>,
): Readonly<Record<string, unknown>> {
  return Object.fromEntries(
    Object.entries(config).map(([key, value]) => [key, printable(value, settings[key])]),
  );
}

function printable(value: unknown, setting: Setting<unknown> | undefined): unknown {
  if (setting?.secret === true && value !== '') {
    return '***';
  }
  if (value instanceof Map) {
    return Object.fromEntries(value);
  }
  const { redact } = setting ?? {};
  return redact !== undefined && Array.isArray(value) ? value.map((entry) => redact(String(entry))) : value;
}

function createSetting<T>(
  variable: string,
  fallback: string | undefined,
  parse: (text: string) => T,
): Setting<T> {
  return { variable, fallback, parse, secret: false };
}

function expected(what: string): RangeError {
  return new RangeError(`must be ${what}`);
}

/** Any text; with the fallback `''` it is optional. */
export function textSetting(variable: string, fallback?: string): Setting<string> {
  return createSetting(variable, fallback, (text) => text);
}

/** Text that is never printed. */
export function secretSetting(variable: string, fallback?: string): Setting<string> {
  return { ...textSetting(variable, fallback), secret: true };
}

/** One of a closed set of words. */
export function choiceSetting<const Word extends string>(
  variable: string,
  words: readonly Word[],
  fallback?: Word,
): Setting<Word> {
  return createSetting(variable, fallback, (text) => {
    const word = words.find((candidate) => candidate === text);
    if (word === undefined) {
      throw expected(`one of ${words.join(', ')}`);
    }
    return word;
  });
}

/** `true` or `false`. */
export function booleanSetting(variable: string, fallback?: boolean): Setting<boolean> {
  const words = choiceSetting(
    variable,
    ['true', 'false'],
    fallback === undefined ? undefined : `${fallback}`,
  );
  return { ...words, parse: (text) => words.parse(text) === 'true' };
}

/** A whole number within bounds, inclusive. */
export function integerSetting(
  variable: string,
  bounds: { readonly min: number; readonly max: number },
  fallback?: number,
): Setting<number> {
  return createSetting(variable, fallback?.toString(), (text) => {
    const value = /^-?\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(value >= bounds.min && value <= bounds.max)) {
      throw expected(`a whole number from ${bounds.min} to ${bounds.max}`);
    }
    return value;
  });
}

const durationUnitsMs: Readonly<Record<string, number>> = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000 };

/** A duration such as `250ms`, `30s`, `5m` or `24h`, in milliseconds. */
export function durationSetting(variable: string, fallback?: string): Setting<number> {
  return createSetting(variable, fallback, (text) => {
    const [, count, unit] = /^(\d+)(ms|s|m|h)$/.exec(text) ?? [];
    const unitMs = durationUnitsMs[unit ?? ''];
    if (count === undefined || unitMs === undefined) {
      throw expected('a duration such as 250ms, 30s, 5m or 24h');
    }
    return Number(count) * unitMs;
  });
}

const sizeUnitsBytes: Readonly<Record<string, number>> = {
  '': 1,
  Ki: 2 ** 10,
  Mi: 2 ** 20,
  Gi: 2 ** 30,
  Ti: 2 ** 40,
};

/** A size such as `512Mi` or `16Gi`, in bytes. */
export function sizeSetting(variable: string, fallback?: string): Setting<number> {
  return createSetting(variable, fallback, (text) => {
    const [, count, unit] = /^(\d+)(Ki|Mi|Gi|Ti)?$/.exec(text) ?? [];
    const unitBytes = sizeUnitsBytes[unit ?? ''];
    if (count === undefined || unitBytes === undefined) {
      throw expected('a size such as 65536, 512Mi or 16Gi');
    }
    return Number(count) * unitBytes;
  });
}

/**
 * `host:port` to listen on or to connect to; port 0 chooses a free port. IPv6 hosts need brackets. With the fallback
 * `''` it is optional.
 */
export function addressSetting(variable: string, fallback?: string): Setting<string> {
  return createSetting(variable, fallback, (text) => {
    if (text === '' && fallback === '') {
      return '';
    }
    const [, port] = /^(?:\[[0-9a-fA-F:.]+\]|[^\s:[\]]+):(\d{1,5})$/.exec(text) ?? [];
    if (port === undefined || Number(port) > 65_535) {
      throw expected('host:port with a port from 0 to 65535');
    }
    return text;
  });
}

/** Entries between commas, each trimmed and not empty; an empty text is an empty list. */
export function listSetting(variable: string, fallback?: string): Setting<readonly string[]> {
  return createSetting(variable, fallback, (text) => {
    const entries = text === '' ? [] : text.split(',').map((entry) => entry.trim());
    if (entries.includes('')) {
      throw expected('entries between commas, none empty');
    }
    return Object.freeze(entries);
  });
}

/**
 * Names with a text each: `name=text` between commas, or a JSON object, which may hold any name and any text. An
 * empty text is an empty map; each name may appear once.
 */
export function mapSetting(variable: string, fallback?: string): Setting<ReadonlyMap<string, string>> {
  return createSetting(variable, fallback, (text) => {
    const pairs = text.startsWith('{') ? pairsOfJson(text) : pairsOfList(text);
    const map = new Map(pairs);
    if (pairs === undefined || map.size < pairs.length || map.has('')) {
      throw expected(
        'name=text between commas, or a JSON object of texts where they hold commas; each name once',
      );
    }
    return map;
  });
}

type Pair = readonly [string, string];

function pairsOfList(text: string): readonly Pair[] | undefined {
  const entries = text === '' ? [] : text.split(',').map((entry) => entry.trim());
  return entries.every((entry) => /^[^=]+=./s.test(entry))
    ? entries.map((entry) => {
        const equals = entry.indexOf('=');
        return [entry.slice(0, equals), entry.slice(equals + 1)];
      })
    : undefined;
}

function pairsOfJson(text: string): readonly Pair[] | undefined {
  try {
    const pairs = Object.entries<unknown>(JSON.parse(text));
    return pairs.every((pair): pair is [string, string] => typeof pair[1] === 'string' && pair[1] !== '')
      ? pairs
      : undefined;
  } catch {
    return undefined;
  }
}

/**
 * NATS servers between commas, as bus/nats/credentials.ts reads them; a user and password in them are printed as ***.
 */
export function natsServersSetting(variable: string, fallback?: string): Setting<readonly string[]> {
  return {
    ...listSetting(variable, fallback),
    redact: (text) => text.replaceAll(/[^/,@]+@/g, '***@'),
  };
}
