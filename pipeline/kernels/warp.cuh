// What a warp of 32 lanes does together, and the instructions of a GPU that C++ has no name for, as
// inline PTX: a dozen functions, from sm_80 on, without any header of CUDA.
//
// tests/emulated/warp.cuh has the same functions on a CPU, so that the kernels above them run there.
// Halves are 16 bits of a u32 that holds two of them, the first in the low bits.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define INLINE __device__ __forceinline__

INLINE int block() { return blockIdx.x; }
INLINE int thread() { return threadIdx.x; }

// Memory of a block, unset.
template <class T>
INLINE T& shared() {
  __shared__ T memory;
  return memory;
}

// What lanes wrote to shared memory is there for all of them.
INLINE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// Which lanes say yes, as bits.
INLINE u32 lanes_with(bool yes) {
  u32 lanes;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff;}"
      : "=r"(lanes) : "r"((u32)yes));
  return lanes;
}

// `value` of the lane `from`.
INLINE int of_lane(int value, int from) {
  int found;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(found) : "r"(value), "r"(from));
  return found;
}

// `value` of the lane `by` below; of the lane itself where there is none.
INLINE int of_lane_below(int value, int by) {
  int found;
  asm volatile("shfl.sync.up.b32 %0, %1, %2, 0, 0xffffffff;" : "=r"(found) : "r"(value), "r"(by));
  return found;
}

INLINE int bits_set(u32 word) { return __popc(word); }
INLINE int first_bit(u32 word) { return __ffs(word) - 1; }

INLINE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

INLINE float root(float x) {  // square root
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as halves, each rounded to the nearest.
INLINE u32 halves(float first, float second) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

INLINE u32 times(u32 a, u32 b) {  // of halves
  u32 pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// Each half that is at least that of `least`; 0 in place of one that is not, or is NaN.
INLINE u32 at_least(u32 pair, u32 least) {
  u32 kept;
  asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(kept) : "r"(pair), "r"(least));
  return pair & kept;
}

// 8 x 8 halves, lane 4 g + t holding columns 2 t and 2 t + 1 of row g, transposed.
INLINE u32 transposed(u32 pair) {
  u32 found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(pair));
  return found;
}

// d [16, 8] += a [16, 16] b [16, 8], halves into floats. Lane 4 g + t holds
//   a  row g: columns 2t, 2t+1 in a[0] and 2t+8, 2t+9 in a[2]; row g+8: the same in a[1] and a[3]
//   b  column g: rows 2t, 2t+1 in b0 and 2t+8, 2t+9 in b1
//   d  columns 2t, 2t+1: of row g in d[0], d[1], of row g+8 in d[2], d[3]
INLINE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d [16, 8] = a [16, 8] b [8, 8], halves into halves. Lane 4 g + t holds
//   a  columns 2t, 2t+1: of row g in a0, of row g+8 in a1
//   b  column g: rows 2t, 2t+1
//   d  columns 2t, 2t+1: of row g in d[0], of row g+8 in d[1]
INLINE void multiply(u32 (&d)[2], u32 a0, u32 a1, u32 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, {%5, %5};"
      : "=r"(d[0]), "=r"(d[1]) : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

INLINE i64 nearest(float x) {  // integer
  i64 found;
  asm("cvt.rni.s64.f32 %0, %1;" : "=l"(found) : "f"(x));
  return found;
}

// Added in memory, by whichever lane comes first: of integers that gives the same bits.
INLINE void add(i64* place, i64 value) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(place), "l"(value) : "memory");
}

INLINE void set_bits(u32* place, u32 bits) {
  asm volatile("red.global.or.b32 [%0], %1;" ::"l"(place), "r"(bits) : "memory");
}

struct __align__(8) Pair { float x, y; };

// 16 bytes at once.
struct __align__(16) Four { u32 x, y, z, w; };
INLINE float real(u32 bits) { return __uint_as_float(bits); }
INLINE u32 bits_of(float x) { return __float_as_uint(x); }
