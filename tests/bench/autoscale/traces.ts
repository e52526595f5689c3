// Seeded request traces with the statistics of public ones: Azure's conversation and code traces of 2023 (arrival
// variance at 1, 10 and 60 s; log-normal lengths) and ServeGen's reasoning pool (lengths, peak and trough over the
// day). Volumes are scaled so that the mean needs about ten groups; coefficients of variation are kept, not thinned.

/** One request of a trace. */
export interface TraceRequest {
  readonly arrivalMs: number;
  readonly promptTokens: number;
  readonly completionTokens: number;
  /** What the client permits (max_tokens): all that a queue can know in advance. */
  readonly permittedTokens: number;
}

export interface Trace {
  readonly name: string;
  readonly durationMs: number;
  readonly requests: readonly TraceRequest[];
}

/** mulberry32: numbers in [0, 1), the same for the same seed. */
function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

type Random = () => number;

function drawNormal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

function drawExponential(random: Random, mean: number): number {
  return -mean * Math.log(1 - random());
}

/** Log-normal lengths: mean and deviation of the logarithm, and the longest that is allowed. */
interface Lengths {
  readonly prompt: readonly [mu: number, sigma: number, max: number];
  readonly completion: readonly [mu: number, sigma: number, max: number];
}

const conversationLengths: Lengths = { prompt: [6.63, 0.99, 16_384], completion: [5.02, 0.86, 4096] };
const codeLengths: Lengths = { prompt: [7, 1.1, 16_384], completion: [2.79, 0.85, 1024] };
// deepseek-r1's clients: prompts 263 / 3,817 and completions 849 / 5,815 at p50 / p90.
const reasoningLengths: Lengths = { prompt: [5.57, 2.09, 16_384], completion: [6.74, 1.5, 16_384] };

function drawRequest(random: Random, arrivalMs: number, lengths: Lengths): TraceRequest {
  const draw = ([mu, sigma, max]: readonly [number, number, number]): number =>
    Math.max(1, Math.min(max, Math.round(Math.exp(mu + sigma * drawNormal(random)))));
  const completionTokens = draw(lengths.completion);
  // Clients set a round limit, somewhere between what they need and four times that.
  const permittedTokens = 2 ** Math.ceil(Math.log2(completionTokens * (1 + 3 * random())));
  return { arrivalMs, promptTokens: draw(lengths.prompt), completionTokens, permittedTokens };
}

interface TraceOptions {
  readonly name: string;
  readonly seed: number;
  readonly minutes: number;
  readonly lengths: Lengths;
  /** Requests per second at a time. */
  readonly rate: (seconds: number) => number;
  /** Standard deviation of the logarithm of the rate's slow noise, which forgets within two minutes. */
  readonly noise: number;
}

/** A Poisson process whose rate is `rate` times slow log-normal noise, in steps of half a second. */
function modulatedTrace(options: TraceOptions): Trace {
  const { name, seed, minutes, lengths, rate, noise } = options;
  const random = createRandom(seed);
  const requests: TraceRequest[] = [];
  const stepSeconds = 0.5;
  const keep = Math.exp(-stepSeconds / 120);
  let level = drawNormal(random);
  for (let at = 0; at < minutes * 60; at += stepSeconds) {
    level = keep * level + Math.sqrt(1 - keep * keep) * drawNormal(random);
    const current = rate(at) * Math.exp(noise * level - (noise * noise) / 2);
    let within = drawExponential(random, 1 / current);
    while (within < stepSeconds) {
      requests.push(drawRequest(random, (at + within) * 1000, lengths));
      within += drawExponential(random, 1 / current);
    }
  }
  return { name, durationMs: minutes * 60_000, requests };
}

/** A day in eight hours: trough 0.25 and peak 2.7 times the mean, as of ServeGen's reasoning pool. */
function diurnalRate(seconds: number): number {
  const phase = (seconds / (8 * 3600)) * 2 * Math.PI;
  // The exponential of a cosine has a short peak and a long trough; its mean is the Bessel function I0(1.19) = 1.385.
  return (1.55 * Math.exp(-1.19 * Math.cos(phase))) / 1.385;
}

/**
 * Bursts of 7 s on average, one every 21 s, over a floor of a tenth: counts per 1, 10 and 60 s vary as in Azure's code
 * trace (coefficients of variation of the rate of about 2.1, 1.6 and 1.0).
 */
function burstRate(seed: number, minutes: number, mean: number): (seconds: number) => number {
  const random = createRandom(seed);
  const stepSeconds = 0.5;
  const rates = new Float64Array(Math.ceil((minutes * 60) / stepSeconds)).fill(mean * 0.1);
  const meanHeight = (0.9 * mean * 21) / 7;
  for (let at = drawExponential(random, 21); at < minutes * 60; at += drawExponential(random, 21)) {
    const height = meanHeight * Math.exp(0.7 * drawNormal(random) - 0.245);
    const end = Math.min(rates.length, (at + drawExponential(random, 7)) / stepSeconds);
    for (let step = Math.floor(at / stepSeconds); step < end; step++) {
      rates[step] = (rates[step] ?? 0) + height;
    }
  }
  return (seconds) => rates[Math.floor(seconds / stepSeconds)] ?? 0;
}

/** Silence, broken by visits of one client every half hour or so, and once by 40 requests at a time. */
function zeroTrace(seed: number): Trace {
  const random = createRandom(seed);
  const minutes = 240;
  const requests: TraceRequest[] = [];
  for (let at = 1200; at < minutes * 60 - 1200; at += 600 + drawExponential(random, 1500)) {
    for (let turn = 0, when = at; turn < 6; turn++, when += drawExponential(random, 25)) {
      requests.push(drawRequest(random, when * 1000, conversationLengths));
    }
  }
  for (let index = 0; index < 40; index++) {
    requests.push(drawRequest(random, 7200_000 + index * 5, conversationLengths));
  }
  return {
    name: 'zero traffic',
    durationMs: minutes * 60_000,
    requests: requests.toSorted((a, b) => a.arrivalMs - b.arrivalMs),
  };
}

/** Ten times the load within ten seconds, for five minutes; then it fades over a few minutes. */
function flashRate(seconds: number): number {
  const since = seconds - 2400;
  if (since < 0) {
    return 4;
  }
  return 4 * (1 + 9 * (since < 300 ? Math.min(1, since / 10) : Math.exp(-(since - 300) / 120)));
}

/** All traces of the benchmark. The same seed gives the same traces. */
export function createTraces(seed: number): readonly Trace[] {
  const conversation = { lengths: conversationLengths, noise: 0.24 };
  return [
    modulatedTrace({
      name: 'diurnal',
      seed: seed + 1,
      minutes: 480,
      lengths: reasoningLengths,
      noise: 0.15,
      rate: diurnalRate,
    }),
    modulatedTrace({ ...conversation, name: 'conversation', seed: seed + 2, minutes: 120, rate: () => 12 }),
    modulatedTrace({
      name: 'code bursts',
      seed: seed + 3,
      minutes: 120,
      lengths: codeLengths,
      noise: 0.1,
      rate: burstRate(seed + 30, 120, 16),
    }),
    modulatedTrace({
      ...conversation,
      name: 'step x4',
      seed: seed + 4,
      minutes: 90,
      noise: 0.1,
      rate: (seconds) => (seconds >= 1800 && seconds < 3600 ? 16 : 4),
    }),
    modulatedTrace({
      ...conversation,
      name: 'flash crowd x10',
      seed: seed + 5,
      minutes: 90,
      noise: 0.1,
      rate: flashRate,
    }),
    zeroTrace(seed + 6),
    modulatedTrace({
      ...conversation,
      name: 'steady',
      seed: seed + 7,
      minutes: 90,
      noise: 0,
      rate: () => 12,
    }),
  ];
}
