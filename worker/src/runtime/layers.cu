// A layer without its attention, on sm_90 and later, in bfloat16: the products of passes of few rows, y = W x with W
// [out, in] as in the checkpoint, and the operations between products: norms, bias, SiLU, the residual's sums. For
// NVRTC, without headers. cuda-layers.ts defines the capitalised names that are not defined here.
//
// Reading W determines the duration of passes of few rows. One block per multiprocessor computes tiles of 16 rows of W
// (m16n8k16: rows of W fill the 16, rows of x the 8 columns). Its warps divide the columns, each with its own ring of
// cp.async stages, which continues across tiles. The order of k within 32 is free as long as W and x agree, so each
// lane loads 16 bytes at once. Reading W begins before the previous kernel ends (programmatic dependent launch), since
// W does not depend on it.
//
// A norm is split: the writer of x multiplies in its gain, and y is scaled by one factor per row. `squares` holds each
// row's sums of squares over 16 columns of x; they are added in a fixed order, so that the same pass gives the same
// bits.

typedef unsigned int u32;
typedef unsigned short u16;
#define ROWS 8
#define PARTS (HIDDEN / 16)

__device__ __forceinline__ float toFloat(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u16 toHalf(float x) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }
// Loads output of the previous kernel: call only after waitForBefore.
__device__ __forceinline__ uint4 readRow(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The first allows the next kernel to start; the second waits for the output of the previous kernels.
__device__ __forceinline__ void letNextStart() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void waitForBefore() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#define CONSUMERS (WARPS * 32)
#define THREADS (CONSUMERS + 32)    // and the warp that reads the norms' factors
#define COLUMNS 64                  // of a stage: 16 rows of 128 bytes
#define STAGE_BYTES 2048

__device__ __forceinline__ u32 sharedAddress(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Shared memory of a block: each warp's ring of stages, and the partial sums of the warps.
struct Shared {
  unsigned char stages[WARPS][STAGES][STAGE_BYTES];
  float parts[2][WARPS][ROWS][17];
  float factors[ROWS];
};
extern __shared__ __align__(128) unsigned char raw[];

// Runs `finish` over tiles of 16 rows of W, blockIdx.x and every gridDim.x further ones. rowAt(tile, r) is the address
// of a tile's row r; `finish(tile, sum, row, n)` gets every sum: row of x, row n of the tile, by threads of which 16
// in turn have the n of one row.
template <int K, class RowAt, class Finish>
__device__ __forceinline__ void multiply(int tiles, const u16* x, int rows, const float* squares, RowAt rowAt, Finish finish) {
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  constexpr int chunks = K / COLUMNS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  letNextStart();
  if (warp == WARPS) { // the factors of the rows' norms, for the first `finish`
    waitForBefore();
    if (squares != nullptr) {
      for (int row = 0; row < rows; row++) {
        float sum = 0;
        #pragma unroll
        for (int i = lane; i < PARTS; i += 32) sum += squares[row * PARTS + i];
        #pragma unroll
        for (int s = 16; s > 0; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);
        if (lane == 0) shared.factors[row] = rsqrtf(sum / HIDDEN + EPSILON);
      }
    }
    __syncwarp();
    asm volatile("bar.arrive 2, %0;" :: "n"(THREADS) : "memory");
    return;
  }
  // A warp processes every WARPS-th chunk of each tile; its prefetches continue into the next tile.
  const u32 ring = sharedAddress(shared.stages[warp]);
  int fetchTile = blockIdx.x, fetchChunk = warp;
  auto fetch = [&](int stage) {
    if (fetchTile < tiles) {
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = i * 4 + (lane >> 3), part = lane & 7;
        const u16* from = rowAt(fetchTile, row) + fetchChunk * COLUMNS + part * 8;
        // Odd rows have their halves exchanged, so that eight lanes reading at once have no bank conflicts.
        const u32 to = ring + stage * STAGE_BYTES + row * 128 + ((part ^ ((row & 1) << 2)) << 4);
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
      }
      fetchChunk += WARPS;
      if (fetchChunk >= chunks) { fetchChunk = warp; fetchTile += gridDim.x; }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  #pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(i);
  waitForBefore();
  const int group = lane >> 2;
  const uint4* xAt = reinterpret_cast<const uint4*>(x + (size_t)group * K + (lane & 3) * 8);
  uint4 b[2] = {};
  auto readX = [&](int chunk) {
    if (group < rows) {
      b[0] = readRow(xAt + chunk * (COLUMNS / 8));
      b[1] = readRow(xAt + chunk * (COLUMNS / 8) + 4);
    }
  };
  readX(warp);
  int stage = 0, fill = STAGES - 1, side = 0;
  const u32 from = group * 128 + ((lane & 3) << 4), odd = (group & 1) << 6;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float c[4] = {};
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
      __syncwarp();
      fetch(fill);
      fill = fill + 1 == STAGES ? 0 : fill + 1;
      const unsigned char* at = shared.stages[warp][stage] + from;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      const uint4 low0 = *reinterpret_cast<const uint4*>(at + odd), high0 = *reinterpret_cast<const uint4*>(at + odd + 1024);
      const uint4 low1 = *reinterpret_cast<const uint4*>(at + (odd ^ 64)), high1 = *reinterpret_cast<const uint4*>(at + (odd ^ 64) + 1024);
      mma(c, low0.x, high0.x, low0.y, high0.y, b[0].x, b[0].y);
      mma(c, low0.z, high0.z, low0.w, high0.w, b[0].z, b[0].w);
      mma(c, low1.x, high1.x, low1.y, high1.y, b[1].x, b[1].y);
      mma(c, low1.z, high1.z, low1.w, high1.w, b[1].z, b[1].w);
      readX(chunk + WARPS < chunks ? chunk + WARPS : warp);
      __syncwarp();
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) shared.parts[side][warp][(lane & 3) * 2 + (i & 1)][group + (i >> 1) * 8] = c[i];
    if (tile == blockIdx.x) asm volatile("bar.sync 2, %0;" :: "n"(THREADS) : "memory");
    else asm volatile("bar.sync 1, %0;" :: "n"(CONSUMERS) : "memory");
    for (int i = threadIdx.x; i < ROWS * 16; i += CONSUMERS) {
      float sum = 0;
      #pragma unroll
      for (int w = 0; w < WARPS; w++) sum += shared.parts[side][w][i >> 4][i & 15];
      finish(tile, sum, i >> 4, i & 15);
    }
    side ^= 1;
  }
}

// The first layer's x, [rows, HIDDEN], multiplied by its gain, and its squares. One block per row.
extern "C" __global__ void __launch_bounds__(256)
begin(const u16* x, const u16* __restrict__ gain, u16* gained, float* squares) {
  waitForBefore();
  letNextStart();
  const size_t row = blockIdx.x;
  for (int part = threadIdx.x; part < PARTS; part += 256) {
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < 16; i++) {
      const float value = toFloat(x[row * HIDDEN + part * 16 + i]);
      sum += value * value;
      gained[row * HIDDEN + part * 16 + i] = toHalf(value * toFloat(gain[part * 16 + i]));
    }
    squares[row * PARTS + part] = sum;
  }
}

// qkv [rows, QKV] = W norm(x) + bias.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend(const u16* __restrict__ weight, const u16* __restrict__ bias, const u16* gained, const float* squares, int rows, u16* qkv) {
  const float* factors = reinterpret_cast<Shared*>(raw)->factors;
  multiply<HIDDEN>(QKV / 16, gained, rows, squares,
    [&](int tile, int r) { return weight + (size_t)(tile * 16 + r) * HIDDEN; },
    [&](int tile, float sum, int row, int n) {
      if (row < rows) qkv[(size_t)row * QKV + tile * 16 + n] = toHalf(sum * factors[row] + toFloat(bias[tile * 16 + n]));
    });
}

// out [rows, FF] = SiLU(gate) up, of W [2 FF, HIDDEN]: gate, then up. A tile is 8 rows of gate and the 8 of up.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
expand(const u16* __restrict__ weight, const u16* gained, const float* squares, int rows, u16* out) {
  const float* factors = reinterpret_cast<Shared*>(raw)->factors;
  multiply<HIDDEN>(FF / 8, gained, rows, squares,
    [&](int tile, int r) { return weight + ((size_t)(r >> 3) * FF + tile * 8 + (r & 7)) * HIDDEN; },
    [&](int tile, float sum, int row, int n) {
      const float up = __shfl_down_sync(~0u, sum, 8, 16);
      if (row < rows && n < 8) out[(size_t)row * FF + tile * 8 + n] = toHalf(gated(sum * factors[row], up * factors[row]));
    });
}

// residual [rows, HIDDEN] += W x, in place; `gained` is its product with the gain of the next norm, and `squares` its
// sums of squares.
template <int K>
__device__ __forceinline__ void add(const u16* weight, const u16* x, u16* residual, const u16* gain, int rows, u16* gained, float* squares) {
  multiply<K>(HIDDEN / 16, x, rows, nullptr,
    [&](int tile, int r) { return weight + (size_t)(tile * 16 + r) * K; },
    [&](int tile, float sum, int row, int n) {
      const bool real = row < rows;
      const size_t at = (size_t)row * HIDDEN + tile * 16 + n;
      const u16 half = real ? toHalf(sum + toFloat(__ldcg(residual + at))) : 0;
      const float value = toFloat(half);
      float square = value * value;
      #pragma unroll
      for (int s = 8; s > 0; s >>= 1) square += __shfl_xor_sync(~0u, square, s);
      if (real) {
        residual[at] = half;
        gained[at] = toHalf(value * toFloat(gain[tile * 16 + n]));
        if (n == 0) squares[row * PARTS + tile] = square;
      }
    });
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
addAttended(const u16* __restrict__ weight, const u16* x, u16* residual, const u16* __restrict__ gain, int rows, u16* gained, float* squares) {
  add<ATTENDED>(weight, x, residual, gain, rows, gained, squares);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
addProduct(const u16* __restrict__ weight, const u16* x, u16* residual, const u16* __restrict__ gain, int rows, u16* gained, float* squares) {
  add<FF>(weight, x, residual, gain, rows, gained, squares);
}

// For passes of many rows, whose products cuBLAS computes. normed [rows, HIDDEN] = norm(x), one block per row. With a
// bias, also fills each row of `qkv`, [rows, QKV], with it; the product is then added.
extern "C" __global__ void __launch_bounds__(256)
normalize(const u16* x, const u16* gain, u16* normed, const u16* bias, u16* qkv) {
  __shared__ float warpSums[8];
  waitForBefore();
  letNextStart();
  const size_t row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(x + row * HIDDEN);
  float sum = 0;
  for (int i = threadIdx.x; i < HIDDEN / 8; i += 256) {
    const uint4 v = from[i];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 pair = (&v.x)[j];
      const float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xffff0000u);
      sum += a * a + b * b;
    }
  }
  #pragma unroll
  for (int s = 16; s > 0; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);
  if ((threadIdx.x & 31) == 0) warpSums[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0;
  #pragma unroll
  for (int w = 0; w < 8; w++) sum += warpSums[w];
  const float factor = rsqrtf(sum / HIDDEN + EPSILON);
  uint4* to = reinterpret_cast<uint4*>(normed + row * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += 256) {
    const uint4 v = from[i], g = reinterpret_cast<const uint4*>(gain)[i];
    uint4 r;
    #pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 pair = (&v.x)[j], gains = (&g.x)[j];
      (&r.x)[j] = pack(__uint_as_float(pair << 16) * factor * __uint_as_float(gains << 16),
                       __uint_as_float(pair & 0xffff0000u) * factor * __uint_as_float(gains & 0xffff0000u));
    }
    to[i] = r;
  }
  if (bias != nullptr) {
    for (int i = threadIdx.x; i < QKV / 8; i += 256)
      reinterpret_cast<uint4*>(qkv + row * QKV)[i] = reinterpret_cast<const uint4*>(bias)[i];
  }
}

// out [rows, FF] = SiLU(gate) up of both [rows, 2 FF]: gate, then up. A thread for every 8 of `out`.
extern "C" __global__ void __launch_bounds__(256) activate(const uint4* both, uint4* out, int rows) {
  waitForBefore();
  letNextStart();
  const int i = blockIdx.x * 256 + threadIdx.x, row = i / (FF / 8), column = i % (FF / 8);
  if (row >= rows) return;
  const uint4 g = both[(size_t)row * (FF / 4) + column], u = both[(size_t)row * (FF / 4) + FF / 8 + column];
  uint4 r;
  #pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 gates = (&g.x)[j], ups = (&u.x)[j];
    (&r.x)[j] = pack(gated(__uint_as_float(gates << 16), __uint_as_float(ups << 16)),
                     gated(__uint_as_float(gates & 0xffff0000u), __uint_as_float(ups & 0xffff0000u)));
  }
  out[i] = r;
}
