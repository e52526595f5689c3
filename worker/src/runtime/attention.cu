// Attention of decode passes on sm_80 and later: rotation and placing of new keys and values, and attention over paged
// keys and values, [pages][PAGE][KV_HEADS][128], for spans of one row or two (a token and its draft), 4 query heads a
// KV head. For NVRTC, without headers. cuda-attention.ts defines the capitalised names that are not defined here, and
// lays out the plan.
//
// Work is cut into equal runs of units (16 positions a warp of one KV head) over all blocks, whatever the lengths: one
// recorded launch serves every length. Each warp has its own ring of cp.async stages. The last block of each span and
// head adds up the parts. S^T = K Q^T and O^T = V^T P^T with m16n8k16: positions and dimensions fill the 16 rows, the 8
// columns are 4 heads x 2 rows, so that nothing is padded for a draft.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define NEG_INF __int_as_float(0xff800000)
#define D 128
#define UNIT (16 * WARPS)     // positions a unit
#define COLUMNS (SPAN_ROWS * 4)
#define STAGE_BYTES 8192      // 16 positions of keys, then of values
#define SCALE_LOG2 (0.08838834764831845f * 1.4426950408889634f) // 1 / sqrt(D), in octaves
#define PART_FLOATS (8 * D + 16)

// int32 words of a pass of `spans` spans and `rows` rows, one after another.
struct Plan {
  const int* words;
  int spans, rows;
  __device__ __forceinline__ int width() const { return words[0]; }                        // pages of a span in the table
  __device__ __forceinline__ const int* lengths() const { return words + 1; }              // positions, the rows' included
  __device__ __forceinline__ const int* unitStarts() const { return words + 1 + spans; }   // units before each span
  __device__ __forceinline__ const int* rowStarts() const { return words + 2 + 2 * spans; }
  __device__ __forceinline__ const int* spanOfRow() const { return words + 3 + 3 * spans; }
  __device__ __forceinline__ const int* table() const { return words + 3 + 3 * spans + rows; }
};

#if FLOAT16
#define TYPE "f16"
__device__ __forceinline__ float toFloat(u16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
#else
#define TYPE "bf16"
__device__ __forceinline__ float toFloat(u16 x) { return __uint_as_float((u32)x << 16); }
#endif
__device__ __forceinline__ u32 sharedAddress(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float lo, float hi) { u32 r; asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ void copy16(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void ldm(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void ldmT(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transpose(u32 x) { u32 y; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x)); return y; }

// The position of a block in the flat order (span, KV head, unit).
struct Cursor {
  int span, group, unit, units, length;
  __device__ __forceinline__ void load(const int* lengths) { length = lengths[span]; units = (length + UNIT - 1) / UNIT; }
  __device__ __forceinline__ void next(const int* lengths, int spans) {
    if (++unit == units) {
      unit = 0;
      if (++group == KV_HEADS) { group = 0; if (++span < spans) load(lengths); }
    }
  }
};

// Kernels may start before the previous kernel has ended: they read nothing of its output before this wait.
__device__ __forceinline__ void waitForBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Rotates the rows' queries into `query` and their keys into the cache, and copies their values there. One block per
// row.
extern "C" __global__ void __launch_bounds__(256)
place(const u16* qkv, const float* __restrict__ cosines, const float* __restrict__ sines,
      const int* __restrict__ words, int spans, int rows, u16* __restrict__ query, u16* __restrict__ keys, u16* __restrict__ values) {
  const Plan plan = {words, spans, rows};
  waitForBefore();
  const int row = blockIdx.x, span = plan.spanOfRow()[row];
  const int position = plan.lengths()[span] - (plan.rowStarts()[span + 1] - row);
  const int page = plan.table()[span * plan.width() + position / PAGE];
  const u16* source = qkv + (size_t)row * (6 * KV_HEADS * D);
  u16* cached = keys + ((size_t)page * PAGE + position % PAGE) * (KV_HEADS * D);
  u16* cachedValue = values + ((size_t)page * PAGE + position % PAGE) * (KV_HEADS * D);
  const int pair = (threadIdx.x & 31) * 2; // dimensions pair, pair + 1 and those half a head further
  const float2 c = *reinterpret_cast<const float2*>(cosines + (size_t)position * (D / 2) + pair);
  const float2 s = *reinterpret_cast<const float2*>(sines + (size_t)position * (D / 2) + pair);
  for (int head = threadIdx.x >> 5; head < 6 * KV_HEADS; head += 8) {
    const u16* from = source + head * D + pair;
    u32 low = *reinterpret_cast<const u32*>(from), high = *reinterpret_cast<const u32*>(from + D / 2);
    if (head < 5 * KV_HEADS) {
      const float x0 = toFloat((u16)low), x1 = toFloat((u16)(low >> 16)), y0 = toFloat((u16)high), y1 = toFloat((u16)(high >> 16));
      low = pack(x0 * c.x - y0 * s.x, x1 * c.y - y1 * s.y);
      high = pack(y0 * c.x + x0 * s.x, y1 * c.y + x1 * s.y);
    }
    u16* to = (head < 4 * KV_HEADS ? query + ((size_t)row * (4 * KV_HEADS) + head) * D
               : head < 5 * KV_HEADS ? cached + (head - 4 * KV_HEADS) * D
                                     : cachedValue + (head - 5 * KV_HEADS) * D) + pair;
    *reinterpret_cast<u32*>(to) = low;
    *reinterpret_cast<u32*>(to + D / 2) = high;
  }
}

// part: 2 slots a block of {O [8][128], m [8], l [8]} floats. counters [spans * KV_HEADS]: 0 before and after.
extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM)
decode(const u16* query, const u16* keys, const u16* values,
       const int* __restrict__ words, int spans, int rows, u16* __restrict__ out, float* __restrict__ part,
       u32* __restrict__ counters) {
  const Plan plan = {words, spans, rows};
  const int* table = plan.table();
  const int* lengths = plan.lengths();
  const int* starts = plan.unitStarts();
  const int* rowStarts = plan.rowStarts();
  const int tableWidth = plan.width();
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ u32 lastSeen;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  unsigned char* stages = raw + warp * (STAGES * STAGE_BYTES);
  float* merge = reinterpret_cast<float*>(raw + WARPS * STAGES * STAGE_BYTES); // [WARPS][COLUMNS][D], then [WARPS][8] m, l
  float* mergeM = merge + WARPS * COLUMNS * D;
  float* mergeL = mergeM + WARPS * 8;

  waitForBefore();
  const int total = starts[spans];
  const int chunk = max((total + (int)gridDim.x - 1) / (int)gridDim.x, 1);
  const int from = blockIdx.x * chunk, to = min(from + chunk, total);
  if (from >= to) return;

  Cursor c;
  {
    int lo = 0, hi = spans - 1;
    while (lo < hi) { int mid = (lo + hi + 1) >> 1; if (starts[mid] <= from) lo = mid; else hi = mid - 1; }
    c.span = lo;
    c.load(lengths);
    int rest = from - starts[lo];
    c.group = rest / c.units;
    c.unit = rest % c.units;
  }
  Cursor p = c; // the producer's

  auto pageOf = [&](const Cursor& k) {
    int position = k.unit * UNIT + warp * 16;
    return k.span < spans && position < k.length ? table[k.span * tableWidth + position / PAGE] : 0;
  };

  auto fetch = [&](const Cursor& k, int page, int stage) {
    int position = k.unit * UNIT + warp * 16 + (lane >> 4);
    const u32 base = sharedAddress(stages + stage * STAGE_BYTES);
    const int column = lane & 15; // 16 lanes read a position's 256 bytes
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = i * 2 + (lane >> 4);
      const int at = position + i * 2;
      const u32 bytes = at < k.length ? 16 : 0;
      size_t offset = ((size_t)page * PAGE + (at % PAGE)) * (KV_HEADS * D) + k.group * D + column * 8;
      u32 to = base + r * 256 + ((column ^ (r & 7)) << 4);
      copy16(to, keys + offset, bytes);
      copy16(to + 4096, values + offset, bytes);
    }
  };


  int fetched = from;
  int page = pageOf(p);
  #pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (fetched < to) {
      Cursor now = p;
      p.next(lengths, spans);
      int nextPage = pageOf(p);
      fetch(now, page, i);
      page = nextPage;
      fetched++;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  u32 q[8][2];
  float o[8][4], m[2], l[2];
  int stage = 0, fill = STAGES - 1;
  bool fresh = true;
  for (int u = from; u < to; u++) {
    if (fresh) { // a new span and KV head: its queries; column n = row * 4 + head in the group
      fresh = false;
      const int n = lane >> 2;
      const bool real = (n >> 2) < rowStarts[c.span + 1] - rowStarts[c.span];
      const u16* source = query + ((size_t)(rowStarts[c.span] + (n >> 2)) * (KV_HEADS * 4) + c.group * 4 + (n & 3)) * D + (lane & 3) * 2;
      #pragma unroll
      for (int k = 0; k < 8; k++) {
        q[k][0] = real ? *reinterpret_cast<const u32*>(source + k * 16) : 0;
        q[k][1] = real ? *reinterpret_cast<const u32*>(source + k * 16 + 8) : 0;
      }
      #pragma unroll
      for (int i = 0; i < 8; i++) { o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0; }
      m[0] = m[1] = NEG_INF;
      l[0] = l[1] = 0;
    }
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
    __syncwarp();
    if (fetched < to) {
      Cursor now = p;
      p.next(lengths, spans);
      int nextPage = pageOf(p);
      fetch(now, page, fill);
      page = nextPage;
      fetched++;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    fill = fill + 1 == STAGES ? 0 : fill + 1;

    const u32 kBase = sharedAddress(stages + stage * STAGE_BYTES), vBase = kBase + 4096;
    float s[4] = {0, 0, 0, 0}, s2[4] = {0, 0, 0, 0};
    {
      const int r = lane & 15;
      #pragma unroll
      for (int k = 0; k < 8; k += 2) {
        u32 a[4];
        ldm(a, kBase + r * 256 + (((k * 2 + (lane >> 4)) ^ (r & 7)) << 4));
        mma(s, a, q[k][0], q[k][1]);
        ldm(a, kBase + r * 256 + (((k * 2 + 2 + (lane >> 4)) ^ (r & 7)) << 4));
        mma(s2, a, q[k + 1][0], q[k + 1][1]);
      }
    }
    const int position = c.unit * UNIT + warp * 16 + (lane >> 2);
    const int spanRows = SPAN_ROWS == 1 ? 1 : rowStarts[c.span + 1] - rowStarts[c.span];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = (lane & 3) * 2 + (i & 1);
      const int end = SPAN_ROWS == 1 ? c.length : c.length - max(spanRows - 1 - (n >> 2), 0);
      s[i] = position + (i >> 1) * 8 < end ? (s[i] + s2[i]) * SCALE_LOG2 : NEG_INF;
    }
    float top0 = fmaxf(s[0], s[2]), top1 = fmaxf(s[1], s[3]);
    #pragma unroll
    for (int x = 4; x < 32; x <<= 1) { top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, x)); top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, x)); }
    const bool grows = top0 > m[0] || top1 > m[1];
    if (__any_sync(~0u, grows)) {
      float m0 = fmaxf(m[0], top0), m1 = fmaxf(m[1], top1);
      float f0 = m0 == NEG_INF ? 1.f : ex2(m[0] - m0), f1 = m1 == NEG_INF ? 1.f : ex2(m[1] - m1);
      m[0] = m0; m[1] = m1;
      l[0] *= f0; l[1] *= f1;
      #pragma unroll
      for (int i = 0; i < 8; i++) { o[i][0] *= f0; o[i][1] *= f1; o[i][2] *= f0; o[i][3] *= f1; }
    }
    const float b0 = m[0] == NEG_INF ? 0.f : m[0], b1 = m[1] == NEG_INF ? 0.f : m[1];
    s[0] = ex2(s[0] - b0); s[2] = ex2(s[2] - b0); s[1] = ex2(s[1] - b1); s[3] = ex2(s[3] - b1);
    l[0] += s[0] + s[2];
    l[1] += s[1] + s[3];
    const u32 p0 = transpose(pack(s[0], s[1])), p1 = transpose(pack(s[2], s[3]));
    {
      const int r = (lane & 7) + ((lane >> 4) << 3);
      #pragma unroll
      for (int i = 0; i < 8; i++) {
        u32 a[4];
        ldmT(a, vBase + r * 256 + (((i * 2 + ((lane >> 3) & 1)) ^ (r & 7)) << 4));
        mma(o[i], a, p0, p1);
      }
    }
    __syncwarp();
    stage = stage + 1 == STAGES ? 0 : stage + 1;

    const bool ends = c.unit + 1 == c.units || u + 1 == to;
    if (ends) { // every warp of the block is here
      #pragma unroll
      for (int x = 4; x < 32; x <<= 1) { l[0] += __shfl_xor_sync(~0u, l[0], x); l[1] += __shfl_xor_sync(~0u, l[1], x); }
      const int n = (lane & 3) * 2;
      if (lane < 4) { mergeM[warp * 8 + n] = m[0]; mergeM[warp * 8 + n + 1] = m[1]; mergeL[warp * 8 + n] = l[0]; mergeL[warp * 8 + n + 1] = l[1]; }
      if (n < COLUMNS) {
        float* to0 = merge + (warp * COLUMNS + n) * D + (lane >> 2);
        #pragma unroll
        for (int i = 0; i < 8; i++) {
          to0[i * 16] = o[i][0]; to0[D + i * 16] = o[i][1]; to0[i * 16 + 8] = o[i][2]; to0[D + i * 16 + 8] = o[i][3];
        }
      }
      __syncthreads();
      const int base = starts[c.span] + c.group * c.units;        // this segment in the flat order
      const int firstBlock = base / chunk, lastBlock = (base + c.units - 1) / chunk;
      const bool whole = firstBlock == lastBlock;
      for (int i = threadIdx.x; i < COLUMNS * (D / 4); i += WARPS * 32) {
        const int n2 = i / (D / 4), d = i % (D / 4) * 4;
        float top = NEG_INF;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, mergeM[w * 8 + n2]);
        float4 sum = {0, 0, 0, 0};
        float mass = 0;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
          const float mw = mergeM[w * 8 + n2];
          const float f = mw == NEG_INF ? 0.f : ex2(mw - top);
          const float4 v = *reinterpret_cast<const float4*>(merge + (w * COLUMNS + n2) * D + d);
          sum.x += f * v.x; sum.y += f * v.y; sum.z += f * v.z; sum.w += f * v.w;
          mass += f * mergeL[w * 8 + n2];
        }
        if (SPAN_ROWS > 1 && (n2 >> 2) >= rowStarts[c.span + 1] - rowStarts[c.span]) continue;
        if (whole) {
          const float r = 1.f / mass;
          u16* to1 = out + ((size_t)(rowStarts[c.span] + (n2 >> 2)) * (KV_HEADS * 4) + c.group * 4 + (n2 & 3)) * D + d;
          *reinterpret_cast<uint2*>(to1) = make_uint2(pack(sum.x * r, sum.y * r), pack(sum.z * r, sum.w * r));
        } else {
          float* slot = part + ((size_t)(blockIdx.x * 2 + (base < from ? 0 : 1))) * PART_FLOATS;
          *reinterpret_cast<float4*>(slot + n2 * D + d) = sum;
          if (d == 0) { slot[8 * D + n2] = top; slot[8 * D + 8 + n2] = mass; }
        }
      }
      if (!whole) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
          u32* counter = counters + c.span * KV_HEADS + c.group;
          const u32 needed = lastBlock - firstBlock;
          const u32 seen = atomicAdd(counter, 1u);
          if (seen == needed) *counter = 0;
          lastSeen = seen == needed;
        }
        __syncthreads();
        if (lastSeen) {
          __threadfence();
          for (int i = threadIdx.x; i < COLUMNS * (D / 4); i += WARPS * 32) {
            const int n2 = i / (D / 4), d = i % (D / 4) * 4;
            if (SPAN_ROWS > 1 && (n2 >> 2) >= rowStarts[c.span + 1] - rowStarts[c.span]) continue;
            auto slotOf = [&](int b) { return part + ((size_t)(b * 2 + (base < b * chunk ? 0 : 1))) * PART_FLOATS; };
            float top = NEG_INF;
            #pragma unroll 8
            for (int b = firstBlock; b <= lastBlock; b++) top = fmaxf(top, __ldcg(slotOf(b) + 8 * D + n2));
            float4 sum = {0, 0, 0, 0};
            float mass = 0;
            #pragma unroll 8
            for (int b = firstBlock; b <= lastBlock; b++) {
              const float* slot = slotOf(b);
              const float4 v = __ldcg(reinterpret_cast<const float4*>(slot + n2 * D + d));
              const float mb = __ldcg(slot + 8 * D + n2), f = mb == NEG_INF ? 0.f : ex2(mb - top);
              sum.x += f * v.x; sum.y += f * v.y; sum.z += f * v.z; sum.w += f * v.w;
              mass += f * __ldcg(slot + 8 * D + 8 + n2);
            }
            const float r = 1.f / mass;
            u16* to1 = out + ((size_t)(rowStarts[c.span] + (n2 >> 2)) * (KV_HEADS * 4) + c.group * 4 + (n2 & 3)) * D + d;
            *reinterpret_cast<uint2*>(to1) = make_uint2(pack(sum.x * r, sum.y * r), pack(sum.z * r, sum.w * r));
          }
        }
      }
      __syncthreads(); // before the merge memory is written again
      fresh = true;
    }
    c.next(lengths, spans);
  }
}
