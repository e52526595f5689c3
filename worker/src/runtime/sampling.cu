// Chooses one token for each row of float32 logits, by the rule of ../engines/mimo/sampler.ts and with equal ids:
// penalties, forbidden ids, temperature, min-p, top-k, top-p, and the Gumbel maximum over PCG3D(seed, position, id);
// with log-probabilities. For NVRTC, without headers. cuda-sampler.ts defines VOCABULARY, the length of a row, and
// FIRST_ID, the id of its first logit; it lays out Request and Batch and reads Answer and Top.
//
// A cluster of 8 blocks holds a row in its shared memory, so device memory is read once, and nothing is sorted:
//   1  penalties and forbidden ids; the maximum
//   2  the mass of all, and a list of the ids within 12 octaves of the maximum with a histogram of their mass, in whole
//      numbers, so that the order of atomics does not matter
//   3  the bin where top-k or top-p is reached; its few elements are ranked directly. If the list does not reach that
//      far: the histogram over everything, refined by the bits of keys. If float32 masses cannot tell on which side of
//      top-p an id is: float64 masses, added as on the host
//   4  the draw. The winner is below ln(mass) - 3.2 once in 4e10, so ids are tested by 1 - u <= exp(x) * 24.6 / mass,
//      and only about 25 ids that pass need their logarithms, in float64 (a second pass without the bound covers the
//      rest)
//
// A key orders a row: larger logit first, lower id at ties; smaller keys come first. Every block of a cluster takes
// every branch that holds a cluster barrier.

typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 512
#define BLOCKS 8                                            // of a cluster; a row each
#define SLICE ((VOCABULARY + 16 * BLOCKS - 1) / (16 * BLOCKS) * 16) // floats of a block: whole 64 bytes
#define CHUNKS 4                                            // bulk copies of a slice
#define CHUNK (SLICE / CHUNKS)
#define BULK (VOCABULARY % 4 == 0)   // bulk copies want 16 bytes
#define BIN_BITS 9
#define BINS (1 << BIN_BITS)
#define RANKED 512                                          // elements that are ranked directly
#define LISTED 8192                                         // ids that a block can list; more: it walks its whole slice
#define WARPS (THREADS / 32)
#define WORDS 4                                             // of an exchange
#define MOST_TOP 20                                         // log-probabilities beside the chosen token's
#define OCTAVES 12.0f                                       // depth of the first look below the maximum
#define DEEP 70.0f                                          // of the second; what is deeper has no weight (exp(-48))
// Float32 masses are that exact, relative to the whole: whole numbers of 17 bits a bin, ex2.approx, sums of floats.
#define MASS_ERROR 2e-5
#define MOST_STEPS 8                                        // neighbours that are looked at before bisecting

#define INFINITY_F __int_as_float(0x7f800000)
#define INFINITY_D __longlong_as_double(0x7ff0000000000000ll)
#define MOST_LOGIT 3.4028234663852886e38          // a finite logit stays finite
#define NO_ID 0xffffffffu
#define NO_KEY (~0ull)

struct Request {
  double temperature;                  // 0: the largest logit
  double lnMinP;                       // -Infinity: off
  double topP;
  double repetitionPenalty, presencePenalty, frequencyPenalty;
  u32 topK;                            // 0: off
  u32 seed, position;
  int logprobs;                        // -1: none; else that many beside the chosen token's
  u32 seenStart, seenCount;            // of the words: pairs of an id and its count, what penalties are about
  u32 forbiddenStart, forbiddenCount;  // of the words: ids
};

// Where a pass's requests lie; the words may move from pass to pass, this does not.
struct Batch {
  const u32* words;
  u32 usable;                          // ids of this rank that exist; what follows is padding
  u32 pad;
};

struct Answer {
  u32 id;
  float logit;                         // after penalties; NaN where the row holds one, and an infinity where that is its maximum
  float logprob;
  u32 pad;
};

struct Top {
  u32 id;
  float logprob;
};

__device__ __forceinline__ u32 sharedAddress(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 clusterRank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
// After __syncthreads, the release by one warp covers the writes of the whole block.
__device__ __forceinline__ void clusterSync() {
  __syncthreads();
  if (threadIdx.x < 32) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 remote(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void put32(u32 at, u32 v) { asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ void put64(u32 at, u64 v) { asm volatile("st.shared::cluster.u64 [%0], %1;" :: "r"(at), "l"(v) : "memory"); }
__device__ __forceinline__ u32 get32(u32 at) { u32 v; asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory"); return v; }

__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// Of a logit: larger first. Both zeros are equal.
__device__ __forceinline__ u32 orderOf(float v) {
  const u32 bits = __float_as_uint(v == 0.f ? 0.f : v);
  return (bits & 0x80000000u) ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ u64 keyOf(float v, u32 id) { return (u64)orderOf(v) << 32 | id; }
__device__ __forceinline__ float logitOf(u64 key) {
  const u32 order = (u32)(key >> 32);
  return __uint_as_float((order & 0x80000000u) ? order : ~order & 0x7fffffffu);
}

// keyedUniform of sampler.ts, times 2^32.
__device__ __forceinline__ u32 hash(u32 seed, u32 position, u32 id) {
  u32 x = seed * 1664525u + 1013904223u, y = position * 1664525u + 1013904223u, z = id * 1664525u + 1013904223u;
  x += y * z; y += z * x; z += x * y;
  x ^= x >> 16; y ^= y >> 16; z ^= z >> 16;
  x += y * z; y += z * x; z += x * y;
  return z;
}
__device__ __noinline__ double score(u32 z, float v, double temperature) {
  const double u = ((double)z + 0.5) * 2.3283064365386962890625e-10;
  return __dsub_rn((double)v / temperature, log(-log(u)));
}
__device__ __noinline__ double weightOf(float v, float top, double temperature) {
  return exp(((double)v - (double)top) / temperature);
}
__device__ __forceinline__ float penalised(float v, u32 count, const Request& r) {
  if (!(fabsf(v) < INFINITY_F)) return v;
  const double repeated = v > 0 ? (double)v / r.repetitionPenalty : __dmul_rn((double)v, r.repetitionPenalty);
  const double used = __dsub_rn(repeated, __dmul_rn(r.frequencyPenalty, (double)count));
  const double all = count > 0 ? __dsub_rn(used, r.presencePenalty) : used;
  return __double2float_rn(fmin(fmax(all, -MOST_LOGIT), MOST_LOGIT));
}

struct __align__(16) Shared {
  float row[SLICE];
  u32 mass[BINS];
  u32 count[BINS];
  u64 boundary[RANKED];
  u32 boundaryMass[RANKED];
  unsigned short list[LISTED];
  u64 bars[CHUNKS];
  u64 exchanged[2][BLOCKS][WORDS];
  u64 warpWords[WARPS][WORDS];
  double scanMass[WARPS];
  u32 scanCount[WARPS];
  unsigned short contender[RANKED];
  u64 warpTop[WARPS * MOST_TOP];
  u64 blockTop[BLOCKS * MOST_TOP];      // the first block's counts
  u32 contenders, listed, collected, foundBin;
  u32 foundCountBefore, foundCount, allCount;
  double foundMassBefore, allMass;
  u64 last;
  double lastMass;
};

extern "C" __device__ const int sharedBytes = sizeof(Shared);

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 2)
sample(const float* __restrict__ logits, const Batch* __restrict__ batch, const Request* __restrict__ requests,
       Answer* __restrict__ answers, Top* __restrict__ tops) {
  extern __shared__ __align__(128) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const u32 me = clusterRank();
  const int rowIndex = blockIdx.x / BLOCKS;
  const u32 base = me * SLICE;
  const float* source = logits + (size_t)rowIndex * VOCABULARY + base;
  const int length = min(max((int)VOCABULARY - (int)base, 0), SLICE); // of this block's part of the row

  if (t == 0) {
    s.listed = 0;
    s.collected = 0;
    if (BULK) {
      for (int c = 0; c < CHUNKS; c++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(sharedAddress(&s.bars[c])));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int c = 0; c < CHUNKS; c++) {
        const u32 bar = sharedAddress(&s.bars[c]);
        const int bytes = 4 * min(max(length - c * CHUNK, 0), CHUNK);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
        if (bytes > 0) {
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                       :: "r"(sharedAddress(s.row + c * CHUNK)), "l"(source + c * CHUNK), "r"(bytes), "r"(bar) : "memory");
        }
      }
    }
  }
  if (!BULK) {
    for (int i = t; i < length; i += THREADS) s.row[i] = source[i];
  }
  for (int i = t; i < BINS; i += THREADS) { s.mass[i] = 0; s.count[i] = 0; }
  const Request p = requests[rowIndex];
  const u32* words = batch->words;
  const int usable = min(max((int)batch->usable - (int)base, 0), SLICE);
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); // awaited before the first remote write
  auto await = [&](int c) {
    if (!BULK) return;
    u32 done = 0;
    while (!done) {
      asm volatile("{ .reg .pred q; mbarrier.try_wait.parity.shared::cta.b64 q, [%1], 0; selp.u32 %0, 1, 0, q; }"
                   : "=r"(done) : "r"(sharedAddress(&s.bars[c])) : "memory");
    }
  };

  // Reduces the values of all threads of the cluster to one, the same in every thread. Two sets of places, so that no
  // thread overwrites a value that another still reads: a thread passes an exchange only after all have arrived at it.
  u32 exchanges = 0;
  auto reduce = [&](auto& value, auto combine) {
    constexpr int n = sizeof(value) / sizeof(u64);
    u64 other[n];
    for (int o = 16; o; o >>= 1) {
      #pragma unroll
      for (int k = 0; k < n; k++) other[k] = __shfl_xor_sync(~0u, value[k], o);
      combine(value, other);
    }
    if (lane == 0) {
      #pragma unroll
      for (int k = 0; k < n; k++) s.warpWords[warp][k] = value[k];
    }
    __syncthreads();
    if (exchanges == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); // all blocks have begun
    u64 (*places)[WORDS] = s.exchanged[exchanges & 1];
    if (warp == 0) {
      #pragma unroll
      for (int k = 0; k < n; k++) value[k] = s.warpWords[lane & (WARPS - 1)][k];
      for (int o = WARPS / 2; o; o >>= 1) {
        #pragma unroll
        for (int k = 0; k < n; k++) other[k] = __shfl_xor_sync(~0u, value[k], o);
        combine(value, other);
      }
      if (lane < BLOCKS) {
        #pragma unroll
        for (int k = 0; k < n; k++) put64(remote(sharedAddress(&places[me][k]), lane), value[k]);
      }
    }
    clusterSync();
    exchanges++;
    #pragma unroll
    for (int k = 0; k < n; k++) value[k] = places[0][k];
    #pragma unroll
    for (int r = 1; r < BLOCKS; r++) {
      #pragma unroll
      for (int k = 0; k < n; k++) other[k] = places[r][k];
      combine(value, other);
    }
  };
  auto asDouble = [](u64 v) { return __longlong_as_double((long long)v); };
  auto asWord = [](double v) { return (u64)__double_as_longlong(v); };

  // 1: penalties and forbidden ids, then the maximum, chunk by chunk as they arrive
  if (usable < SLICE || p.seenCount > 0 || p.forbiddenCount > 0) {
    for (int c = 0; c < CHUNKS; c++) await(c);
    for (int i = usable + t; i < SLICE; i += THREADS) s.row[i] = -INFINITY_F;
    for (u32 k = t; k < p.seenCount; k += THREADS) {
      const u32 i = words[p.seenStart + 2 * k] - FIRST_ID - base;
      if (i < (u32)usable) s.row[i] = penalised(s.row[i], words[p.seenStart + 2 * k + 1], p);
    }
    __syncthreads();
    for (u32 k = t; k < p.forbiddenCount; k += THREADS) {
      const u32 i = words[p.forbiddenStart + k] - FIRST_ID - base;
      if (i < (u32)usable) s.row[i] = -INFINITY_F;
    }
    __syncthreads();
  }
  float4* row4 = reinterpret_cast<float4*>(s.row);
  float top = -INFINITY_F;
  bool nan = false;
  for (int c = 0; c < CHUNKS; c++) {
    await(c);
    for (int i = c * (CHUNK / 4) + t; i < (c + 1) * (CHUNK / 4); i += THREADS) {
      float4 v = row4[i];
      if (v.x != v.x || v.y != v.y || v.z != v.z || v.w != v.w) {
        nan = true;
        v.x = v.x == v.x ? v.x : -INFINITY_F; v.y = v.y == v.y ? v.y : -INFINITY_F;
        v.z = v.z == v.z ? v.z : -INFINITY_F; v.w = v.w == v.w ? v.w : -INFINITY_F;
        row4[i] = v;
      }
      top = fmaxf(top, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
    }
  }
  {
    u64 w[1] = {(u64)orderOf(top) << 1 | (nan ? 0 : 1)};
    // The smallest order is the largest logit; the lowest bit is 0 in all where it is in one.
    reduce(w, [](u64* a, const u64* b) { const u64 bit = a[0] & b[0] & 1; a[0] = min(a[0] >> 1, b[0] >> 1) << 1 | bit; });
    nan = !(w[0] & 1);
    top = logitOf(w[0] >> 1 << 32);
  }

  const bool greedy = p.temperature == 0 || !(fabsf(top) < INFINITY_F);
  const bool byRank = !greedy && p.topK > 0 && p.topK < batch->usable;
  const bool byMass = !greedy && p.topP < 1;
  const bool cut = byRank || byMass;
  const bool describes = p.logprobs >= 0;
  const double temperature = p.temperature == 0 ? 1 : p.temperature;
  const float scale = (float)(1.4426950408889634 / temperature);
  const float floorV = greedy || p.lnMinP == -INFINITY_D
    ? -INFINITY_F : __double2float_ru(__dadd_rn((double)top, __dmul_rn(temperature, p.lnMinP)));
  auto depth = [&](float v) { return __fmul_rn(__fsub_rn(v, top), scale); }; // in octaves, <= 0

  // The histogram: whole-number mass relative to the top of the bin, and counts.
  bool everything = false;
  float reach = OCTAVES;
  u32 quantBits = 18;
  auto binOf = [&](float x) { return min((int)__fmul_rn(-x, (float)BINS / reach), BINS - 1); };
  auto quant = [&](float x, int bin) {
    return (u32)__float2uint_rn(ex2(x + floorf(bin * (reach / BINS)) + (float)quantBits));
  };
  auto unitOf = [&](int bin) {
    return __longlong_as_double((long long)(1023 - (int)floorf(bin * (reach / BINS)) - (int)quantBits) << 52);
  };
  auto countIn = [&](float x) {
    const int bin = binOf(x);
    atomicAdd(&s.mass[bin], quant(x, bin));
    atomicAdd(&s.count[bin], 1u);
  };
  auto clearHistogram = [&]() {
    for (int i = t; i < BINS; i += THREADS) { s.mass[i] = 0; s.count[i] = 0; }
    __syncthreads();
  };

  // 2: the mass above the floor, the mass of all, the lowest id of the maximum, the ids near the maximum
  double whole, all;
  u32 firstId;
  bool overflow;
  u64 listedOfAll; // ids on the lists of all blocks: the row's best
  {
    const float lowest = fmaxf(floorV, cut ? top - OCTAVES / scale * 0.9999f : -INFINITY_F);
    const bool sums = !greedy || (describes && fabsf(top) < INFINITY_F);
    float sum = 0, sumAll = 0;
    u32 first = NO_ID;
    for (int i = t; i < SLICE / 4; i += THREADS) {
      const float4 v = row4[i];
      const float most = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
      if (sums && (floorV == -INFINITY_F || describes)) {
        sumAll += (ex2(depth(v.x)) + ex2(depth(v.y))) + (ex2(depth(v.z)) + ex2(depth(v.w)));
      }
      if (floorV > -INFINITY_F && most >= floorV) {
        sum += v.x >= floorV ? ex2(depth(v.x)) : 0.f; sum += v.y >= floorV ? ex2(depth(v.y)) : 0.f;
        sum += v.z >= floorV ? ex2(depth(v.z)) : 0.f; sum += v.w >= floorV ? ex2(depth(v.w)) : 0.f;
      }
      if (greedy && most == top) {
        const u32 j = v.x == top ? 0 : v.y == top ? 1 : v.z == top ? 2 : 3;
        first = min(first, base + i * 4 + j);
      }
      if (cut && most >= lowest) {
        const float e[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int j = 0; j < 4; j++) {
          if (e[j] >= lowest) {
            const u32 at = atomicAdd(&s.listed, 1u);
            if (at < LISTED) { s.list[at] = i * 4 + j; countIn(depth(e[j])); }
          }
        }
      }
    }
    __syncthreads();
    u64 w[4] = {asWord(sum), asWord(sumAll), (u64)first << 1 | (s.listed > LISTED ? 0 : 1), t == 0 ? s.listed : 0};
    reduce(w, [&](u64* a, const u64* b) {
      a[0] = asWord(asDouble(a[0]) + asDouble(b[0]));
      a[1] = asWord(asDouble(a[1]) + asDouble(b[1]));
      const u64 bit = a[2] & b[2] & 1;
      a[2] = min(a[2] >> 1, b[2] >> 1) << 1 | bit;
      a[3] += b[3];
    });
    listedOfAll = w[3];
    whole = floorV > -INFINITY_F ? asDouble(w[0]) : asDouble(w[1]);
    all = asDouble(w[1]);
    overflow = !(w[2] & 1);
    firstId = (u32)(w[2] >> 1);
  }

  u64 last = NO_KEY; // of the last candidate
  double candidateMass = whole;

  // Looks up in the cluster's histogram where `wantCount` ids or, if that is 0, `wantMass` are reached: s.found*,
  // s.all*.
  auto find = [&](u32 wantCount, double wantMass, double fineUnit, double massBefore, u32 countBefore) {
    u64 units = 0;
    u32 count = 0;
    #pragma unroll
    for (int r = 0; r < BLOCKS; r++) {
      units += get32(remote(sharedAddress(&s.mass[t]), r));
      count += get32(remote(sharedAddress(&s.count[t]), r));
    }
    const double mass = (double)units * (fineUnit > 0 ? fineUnit : unitOf(t));
    double massTo = mass;
    u32 countTo = count;
    for (int o = 1; o < 32; o <<= 1) {
      const double m = __shfl_up_sync(~0u, massTo, o);
      const u32 c = __shfl_up_sync(~0u, countTo, o);
      if (lane >= o) { massTo += m; countTo += c; }
    }
    if (lane == 31) { s.scanMass[warp] = massTo; s.scanCount[warp] = countTo; }
    if (t == 0) s.foundBin = BINS;
    __syncthreads();
    double earlierMass = lane < warp ? s.scanMass[lane & (WARPS - 1)] : 0.0;
    u32 earlierCount = lane < warp ? s.scanCount[lane & (WARPS - 1)] : 0;
    for (int o = 16; o; o >>= 1) {
      earlierMass += __shfl_xor_sync(~0u, earlierMass, o);
      earlierCount += __shfl_xor_sync(~0u, earlierCount, o);
    }
    massTo += earlierMass + massBefore;
    countTo += earlierCount + countBefore;
    if (t == BINS - 1) { s.allMass = massTo; s.allCount = countTo; }
    const bool here = count > 0 && (wantCount ? (countTo >= wantCount && countTo - count < wantCount)
                                              : (massTo >= wantMass && massTo - mass < wantMass));
    if (here) atomicMin(&s.foundBin, (u32)t);
    __syncthreads();
    if (t == (int)s.foundBin) { s.foundMassBefore = massTo - mass; s.foundCountBefore = countTo - count; s.foundCount = count; }
    __syncthreads();
  };
  auto walkAll = [&](auto visit) {
    for (int i = t; i < SLICE; i += THREADS) {
      const float v = s.row[i];
      if (v >= floorV && v > -INFINITY_F) visit(i, v);
    }
  };
  auto walk = [&](auto visit) {
    if (everything) {
      walkAll(visit);
    } else {
      const int n = s.listed;
      for (int k = t; k < n; k += THREADS) { const int i = s.list[k]; visit(i, s.row[i]); }
    }
  };
  auto deepen = [&]() { // all elements above the floor into the histogram
    clusterSync();
    everything = true;
    reach = DEEP;
    quantBits = 17;
    clearHistogram();
    walk([&](int, float v) { countIn(depth(v)); });
    clusterSync();
  };

  const bool complete = floorV >= top - OCTAVES / scale * 0.9999f; // the list is all that is above the floor
  // Sets `last` and `candidateMass`: candidates are the shortest prefix of those up to `last` that reaches what is
  // wanted.
  auto resolve = [&](u32 wantCount, double wantMass, bool first) {
    find(wantCount, wantMass, 0, 0, 0);
    if (first && s.foundBin == BINS && !everything && !complete) {
      deepen();
      find(wantCount, wantMass, 0, 0, 0);
    }
    if (s.foundBin == BINS) { // never reached: all of them
      candidateMass = s.allMass;
      __syncthreads();
      return;
    }
    const int bin0 = s.foundBin;
    const double unit = unitOf(bin0);
    const u64 outer = last;
    u64 lo = 0;
    int shift = 64; // the set is bin0 and, once shift < 64, keys in [lo, lo + 2^shift)
    while (s.foundCount > RANKED) { // split the set by its keys' range
      const double massBefore = s.foundMassBefore;
      const u32 countBefore = s.foundCountBefore;
      if (shift == 64) {
        u64 w[2] = {NO_KEY, 0};
        walk([&](int i, float v) {
          const u64 k = keyOf(v, base + i);
          if (k <= outer && binOf(depth(v)) == bin0) { w[0] = min(w[0], k); w[1] = max(w[1], k); }
        });
        reduce(w, [](u64* a, const u64* b) { a[0] = min(a[0], b[0]); a[1] = max(a[1], b[1]); });
        lo = w[0];
        shift = 64 - __clzll(w[1] - w[0]); // all keys are below lo + 2^shift
      }
      clusterSync(); // every thread has read the histogram
      clearHistogram();
      const int fine = max(shift - BIN_BITS, 0);
      walk([&](int i, float v) {
        const float x = depth(v);
        const u64 key = keyOf(v, base + i), k = key - lo;
        if (key <= outer && binOf(x) == bin0 && key >= lo && (shift >= 64 || k >> shift == 0)) {
          const int b = (int)(k >> fine);
          atomicAdd(&s.mass[b], quant(x, bin0));
          atomicAdd(&s.count[b], 1u);
        }
      });
      clusterSync();
      find(wantCount, wantMass, unit, massBefore, countBefore);
      if (s.foundBin == BINS) { // rounding only
        candidateMass = s.allMass;
        last = lo + ((u64)BINS << fine) - 1;
        clusterSync();
        return;
      }
      lo += (u64)s.foundBin << fine;
      shift = fine;
    }
    // collect the set in every block, then rank it
    const u32 n = s.foundCount;
    u32 offset = 0;
    for (u32 r = 0; r < me; r++) offset += get32(remote(sharedAddress(&s.count[s.foundBin]), r));
    walk([&](int i, float v) {
      const float x = depth(v);
      const u64 k = keyOf(v, base + i);
      if (k <= outer && binOf(x) == bin0 && (shift >= 64 || (k >= lo && (k - lo) >> shift == 0))) {
        const u32 at = offset + atomicAdd(&s.collected, 1u), q = quant(x, bin0);
        #pragma unroll
        for (int r = 0; r < BLOCKS; r++) { put64(remote(sharedAddress(&s.boundary[at]), r), k); put32(remote(sharedAddress(&s.boundaryMass[at]), r), q); }
      }
    });
    if (t == 0) { s.last = 0; s.lastMass = 0; }
    clusterSync();
    if (t == 0) s.collected = 0;
    for (u32 i = t; i < n; i += THREADS) {
      const u64 k = s.boundary[i];
      u32 before = 0, rankIn = 0; // sums of whole numbers: their order does not matter
      for (u32 j = 0; j < n; j++) { const bool b = s.boundary[j] < k; before += b ? s.boundaryMass[j] : 0; rankIn += b; }
      const double massTo = s.foundMassBefore + ((double)before + s.boundaryMass[i]) * unit;
      const bool in = wantCount ? s.foundCountBefore + rankIn < wantCount : s.foundMassBefore + before * unit < wantMass;
      // the last one in: its successor is out
      if (in && (rankIn + 1 == n || (wantCount ? s.foundCountBefore + rankIn + 1 >= wantCount : massTo >= wantMass))) {
        s.last = k;
        s.lastMass = massTo;
      }
    }
    __syncthreads();
    last = s.last;
    candidateMass = s.lastMass;
    __syncthreads();
  };

  // The mass of the keys up to `limit`, as the host sums it.
  auto exactMass = [&](u64 limit) {
    double sum = 0;
    walkAll([&](int i, float v) {
      if (depth(v) > -DEEP && keyOf(v, base + i) <= limit) sum += weightOf(v, top, temperature);
    });
    u64 w[1] = {asWord(sum)};
    reduce(w, [&](u64* a, const u64* b) { a[0] = asWord(asDouble(a[0]) + asDouble(b[0])); });
    return asDouble(w[0]);
  };
  auto massOfKey = [&](u64 key) { return weightOf(logitOf(key), top, temperature); };
  // The nearest key after `key` (or before it) up to `outer`, or NO_KEY (0).
  auto neighbour = [&](u64 key, u64 outer, bool after) {
    u64 w[1] = {after ? NO_KEY : 0};
    walkAll([&](int i, float v) {
      const u64 k = keyOf(v, base + i);
      if (after ? k > key && k <= outer : k < key) w[0] = after ? min(w[0], k) : max(w[0], k);
    });
    reduce(w, [&](u64* a, const u64* b) { a[0] = after ? min(a[0], b[0]) : max(a[0], b[0]); });
    return w[0];
  };
  // `last` is exact up to the error of float32 masses: moves it to the result of the float64 masses.
  auto settle = [&](u64 outer) {
    double outerMass = 0, mass = 0;
    u64 key = 0; // the last of the row up to `last`
    walkAll([&](int i, float v) {
      const u64 k = keyOf(v, base + i);
      if (k <= outer) {
        const double weight = depth(v) > -DEEP ? weightOf(v, top, temperature) : 0;
        outerMass += weight;
        if (k <= last) { mass += weight; key = max(key, k); }
      }
    });
    u64 w[3] = {asWord(outerMass), asWord(mass), key};
    reduce(w, [&](u64* a, const u64* b) {
      a[0] = asWord(asDouble(a[0]) + asDouble(b[0]));
      a[1] = asWord(asDouble(a[1]) + asDouble(b[1]));
      a[2] = max(a[2], b[2]);
    });
    const double wanted = p.topP * asDouble(w[0]);
    mass = asDouble(w[1]);
    last = w[2];
    u64 below = 0, above = outer; // the mass up to `below` is too little, up to `above` enough
    for (int step = 0; step < MOST_STEPS; step++) {
      if (mass >= wanted) {
        above = last;
        const double without = mass - massOfKey(last);
        const u64 previous = without >= wanted ? neighbour(last, outer, false) : 0;
        if (previous == 0) { candidateMass = mass; return; }
        last = previous;
        mass = without;
      } else {
        below = last;
        const u64 next = neighbour(last, outer, true);
        if (next == NO_KEY) { candidateMass = mass; return; }
        last = next;
        mass += massOfKey(next);
        if (mass >= wanted) { candidateMass = mass; return; }
      }
    }
    while (above - below > 1) {
      const u64 middle = below + (above - below) / 2;
      if (exactMass(middle) >= wanted) above = middle;
      else below = middle;
    }
    last = above;
    candidateMass = exactMass(last);
  };

  // 3: the cuts
  if (cut) {
    if (overflow) deepen();
    if (byRank) resolve(p.topK, 0, true);
    if (byMass) {
      if (byRank) { // the histogram may have been refined
        clusterSync();
        clearHistogram();
        walk([&](int i, float v) { if (keyOf(v, base + i) <= last) countIn(depth(v)); });
        clusterSync();
      }
      const u64 outer = last;
      const double outerMass = candidateMass, wanted = p.topP * outerMass;
      resolve(0, wanted, !byRank);
      last = min(last, outer);
      // The same in every thread: if `last` is certainly neither too late nor too early, nothing remains to settle.
      const double lastMass = last == NO_KEY ? 0 : massOfKey(last);
      const double error = MASS_ERROR * outerMass;
      if (last == NO_KEY || candidateMass - error < wanted || candidateMass - lastMass + error >= wanted) {
        settle(outer);
      }
    }
  }

  // 4: the draw
  u32 chosen = firstId;
  if (!greedy) {
    double best = -INFINITY_D;
    u32 bestId = NO_ID;
    auto weigh = [&](u32 id, float v) {
      const double x = score(hash(p.seed, p.position, FIRST_ID + id), v, p.temperature);
      if (x > best || (x == best && id < bestId)) { best = x; bestId = id; }
    };
    if (t == 0) s.contenders = 0;
    __syncthreads();
    for (int attempt = 0; attempt < 2 && bestId == NO_ID; attempt++) {
      const float bound = attempt == 0 ? (float)(24.6 / candidateMass) : INFINITY_F; // 1 - u <= exp(x) * bound
      auto consider = [&](u32 id, float v) {
        const u32 z = hash(p.seed, p.position, FIRST_ID + id);
        if (attempt == 1 || ((float)~z + 0.5f) * 2.3283064365386963e-10f <= ex2(depth(v)) * bound) {
          const u32 at = atomicAdd(&s.contenders, 1u);
          if (at < RANKED && attempt == 0) s.contender[at] = id - base;
          else weigh(id, v);
        }
      };
      if (cut) {
        walk([&](int i, float v) { if (keyOf(v, base + i) <= last) consider(base + i, v); });
      } else {
        walkAll([&](int i, float v) { consider(base + i, v); });
      }
      __syncthreads();
      if (attempt == 0 && t < min(s.contenders, (u32)RANKED)) { const u32 i = s.contender[t]; weigh(base + i, s.row[i]); }
      u64 w[2] = {asWord(best), bestId};
      reduce(w, [&](u64* a, const u64* b) {
        const double x = asDouble(a[0]), y = asDouble(b[0]);
        if (y > x || (y == x && b[1] < a[1])) { a[0] = b[0]; a[1] = b[1]; }
      });
      best = asDouble(w[0]);
      bestId = (u32)w[1];
    }
    chosen = bestId;
  }

  auto logprobOf = [&](float v) { return (float)(((double)v - (double)top) / temperature - log(all)); };
  if (t == 0 && chosen - base < SLICE) {
    const float v = s.row[chosen - base];
    answers[rowIndex] = {FIRST_ID + chosen, nan ? __int_as_float(0x7fc00000) : v, describes ? logprobOf(v) : 0.f, 0};
  }
  if (p.logprobs <= 0) return; // no block writes to another any more

  // 5: the largest few: of every warp, then of the block, then of the cluster
  const u32 want = p.logprobs;
  const bool hasList = cut && !overflow && listedOfAll >= want;
  u64 mine = NO_KEY, taken = 0;
  auto next = [&](u64 after) { // this thread's first key after another
    u64 least = NO_KEY;
    auto look = [&](int i) {
      const u64 k = keyOf(s.row[i], base + i) + 1; // so that 0 comes before every key
      if (k > after && s.row[i] > -INFINITY_F) least = min(least, k);
    };
    if (hasList) {
      for (int k = t; k < (int)s.listed; k += THREADS) look(s.list[k]);
    } else {
      for (int i = t; i < SLICE; i += THREADS) look(i);
    }
    return least;
  };
  mine = next(0);
  for (u32 place = 0; place < want; place++) {
    u64 least = mine;
    for (int o = 16; o; o >>= 1) least = min(least, __shfl_xor_sync(~0u, least, o));
    if (lane == 0) s.warpTop[warp * MOST_TOP + place] = least;
    if (least == mine && least != NO_KEY) { taken = mine; mine = next(taken); }
  }
  __syncthreads();
  if (me == 0) {
    for (u32 i = t; i < BLOCKS * MOST_TOP; i += THREADS) s.blockTop[i] = NO_KEY;
    if (t < want) tops[rowIndex * MOST_TOP + t] = {NO_ID, 0.f}; // if the row has fewer
  }
  clusterSync();
  auto rankAmong = [&](const u64* keys, u32 groups, u64 key) {
    u32 place = 0;
    for (u32 g = 0; g < groups; g++) for (u32 i = 0; i < want; i++) place += keys[g * MOST_TOP + i] < key;
    return place;
  };
  for (u32 i = t; i < WARPS * MOST_TOP; i += THREADS) {
    if (i % MOST_TOP < want && s.warpTop[i] != NO_KEY) {
      const u32 place = rankAmong(s.warpTop, WARPS, s.warpTop[i]);
      if (place < want) put64(remote(sharedAddress(&s.blockTop[me * MOST_TOP + place]), 0), s.warpTop[i]);
    }
  }
  clusterSync();
  if (me == 0) {
    for (u32 i = t; i < BLOCKS * MOST_TOP; i += THREADS) {
      if (i % MOST_TOP < want && s.blockTop[i] != NO_KEY) {
        const u32 place = rankAmong(s.blockTop, BLOCKS, s.blockTop[i]);
        if (place < want) {
          const u64 key = s.blockTop[i] - 1;
          tops[rowIndex * MOST_TOP + place] = {FIRST_ID + (u32)key, logprobOf(logitOf(key))};
        }
      }
    }
  }
}
