// A warp of 32 lanes on a CPU: the functions of pipeline/kernels/warp.cuh, by the words of the PTX
// manual, so that the kernels above them can be run and compared without a GPU.
//
// Every lane is a fiber with a stack of its own. At each function that a warp does together it
// leaves what it brings and waits until all 32 have come; lanes that come to different functions,
// or end while others wait, are an error. Between two such meetings lanes run one after another, in
// a given order: what is missing a `sync_warp` differs with that order. Shared memory begins as NaN.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define KERNEL(threads) static void
#define INLINE static inline

namespace emulated {

// Halves ---------------------------------------------------------------------------------------

inline double from_half(u16 bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -value : value;
}

// To the nearest, ties to even.
inline u16 to_half(double value) {
  u16 sign = std::signbit(value) ? 0x8000 : 0;
  double size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = size < std::ldexp(1, -14) ? -14 : std::ilogb(size);
  double steps = std::nearbyint(std::ldexp(size, 10 - exponent));  // 2^10 to 2^11; less: subnormal
  return sign + ((exponent + 14) << 10) + (int)steps;
}

struct Table {
  float of[65536];
  Table() {
    for (int i = 0; i < 65536; i++) of[i] = (float)from_half((u16)i);
  }
};
inline const Table HALVES;

inline float low(u32 pair) { return HALVES.of[pair & 0xffff]; }
inline float high(u32 pair) { return HALVES.of[pair >> 16]; }
inline u32 pair(double first, double second) { return to_half(first) | (u32)to_half(second) << 16; }

// Lanes ----------------------------------------------------------------------------------------

struct Brought {
  const char* function;
  u32 words[6];
};

struct Warp {
  static constexpr int STACK = 1 << 16;
  ucontext_t start[32], back;
  jmp_buf here[32], scheduler;
  std::vector<char> stacks = std::vector<char>(32 * STACK);
  Brought brought[2][32];
  int lane, meetings, round[32];
  bool begun[32], ended[32];
  int block, warp;
  void (*body)(const void*);
  const void* argument;
};
inline Warp W;
inline char MEMORY[1 << 18];
inline char ERROR[200];

inline void leave_lane() {
  if (_setjmp(W.here[W.lane]) == 0) _longjmp(W.scheduler, 1);
}

inline void whole_lane() {
  W.body(W.argument);
  W.ended[W.lane] = true;
  _longjmp(W.scheduler, 1);
}

// What all lanes brought to `function`, once all have come.
inline const Brought* meet(const char* function, u32 a = 0, u32 b = 0, u32 c = 0, u32 d = 0, u32 e = 0,
                           u32 f = 0) {
  int parity = W.round[W.lane]++ & 1;
  W.brought[parity][W.lane] = {function, {a, b, c, d, e, f}};
  leave_lane();
  return W.brought[parity];
}

// One warp; lanes in the order `order` [32]. False with ERROR where they do not meet.
inline bool run_warp(const int* order) {
  std::fill_n(W.begun, 32, false);
  std::fill_n(W.ended, 32, false);
  std::fill_n(W.round, 32, 0);
  for (W.meetings = 0;; W.meetings++) {
    for (volatile int k = 0; k < 32; k = k + 1) {
      if (W.ended[order[k]]) continue;
      W.lane = order[k];
      if (_setjmp(W.scheduler)) continue;
      if (W.begun[W.lane]) _longjmp(W.here[W.lane], 1);
      W.begun[W.lane] = true;
      ucontext_t& start = W.start[W.lane];
      getcontext(&start);
      start.uc_stack.ss_sp = W.stacks.data() + W.lane * Warp::STACK;
      start.uc_stack.ss_size = Warp::STACK;
      start.uc_link = nullptr;
      makecontext(&start, whole_lane, 0);
      setcontext(&start);
    }
    int ended = (int)std::count(W.ended, W.ended + 32, true);
    if (ended == 32) return true;
    const char* first = W.brought[W.meetings & 1][order[0]].function;
    for (int lane = 0; lane < 32; lane++) {
      const char* other = W.ended[lane] ? "the end" : W.brought[W.meetings & 1][lane].function;
      if (ended || std::strcmp(first, other)) {
        std::snprintf(ERROR, sizeof ERROR, "block %d, warp %d: lane %d is at %s, another at %s", W.block,
                      W.warp, lane, other, W.ended[order[0]] ? "the end" : first);
        return false;
      }
    }
  }
}

// The kernel `body` in `count` blocks of `threads`, in the order `blocks`.
inline bool launch(void (*body)(const void*), const void* argument, int count, const int* blocks, int threads,
                   const int* order) {
  W.body = body;
  W.argument = argument;
  for (int k = 0; k < count; k++) {
    std::memset(MEMORY, 0xff, sizeof MEMORY);
    for (int warp = 0; warp < threads / 32; warp++) {
      W.block = blocks[k];
      W.warp = warp;
      if (!run_warp(order)) return false;
    }
  }
  return true;
}

}  // namespace emulated

INLINE int block() { return emulated::W.block; }
INLINE int thread() { return 32 * emulated::W.warp + emulated::W.lane; }

template <class T>
INLINE T& shared() {
  static_assert(sizeof(T) <= sizeof emulated::MEMORY);
  return *reinterpret_cast<T*>(emulated::MEMORY);
}

INLINE void sync_warp() { emulated::meet("sync_warp"); }

INLINE u32 lanes_with(bool yes) {
  const emulated::Brought* all = emulated::meet("lanes_with", yes);
  u32 lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= all[lane].words[0] << lane;
  return lanes;
}

INLINE int of_lane(int value, int from) { return (int)emulated::meet("of_lane", value)[from & 31].words[0]; }

INLINE int of_lane_below(int value, int by) {
  int lane = emulated::W.lane;
  return (int)emulated::meet("of_lane_below", value)[lane < by ? lane : lane - by].words[0];
}

INLINE int bits_set(u32 word) { return __builtin_popcount(word); }
INLINE int first_bit(u32 word) { return __builtin_ffs(word) - 1; }

INLINE float ex2(float x) {
  float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f * y : y;
}

INLINE float reciprocal(float x) { return 1 / x; }
INLINE float root(float x) { return std::sqrt(x); }

INLINE u32 halves(float first, float second) {
#ifdef SWAP_HALF
  std::swap(first, second);
#endif
  return emulated::pair(first, second);
}

INLINE u32 times(u32 a, u32 b) {
  using namespace emulated;
  return pair((double)low(a) * low(b), (double)high(a) * high(b));
}

INLINE u32 at_least(u32 pair, u32 least) {
  using namespace emulated;
  return pair & ((low(pair) >= low(least) ? 0xffffu : 0) | (high(pair) >= high(least) ? 0xffff0000u : 0));
}

// movmatrix: row i of the matrix is in lanes 4 i to 4 i + 3.
INLINE u32 transposed(u32 pair) {
  int g = emulated::W.lane / 4, t = emulated::W.lane % 4;
  const emulated::Brought* all = emulated::meet("transposed", pair);
  auto element = [&](int row, int column) {
    return all[4 * row + column / 2].words[0] >> 16 * (column % 2) & 0xffffu;
  };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

namespace emulated {

inline float half_of(const u32* words, int i) { return i % 2 ? high(words[i / 2]) : low(words[i / 2]); }

// Elements of the fragments of m16n8k16 and, with `registers` of a and b as they are there, m16n8k8.
// a0 and a1 are columns below 8 of rows groupID and groupID + 8, a2 and a3 columns from 8 on.
inline float of_a(const Brought* all, int row, int column) {
  int lane = row % 8 * 4 + column % 8 / 2;
#ifdef SWAP_A  // wrong on purpose, as the next ones: a test must find it
  return half_of(all[lane].words, column % 2 + 4 * (row / 8) + 2 * (column / 8));
#endif
  return half_of(all[lane].words, column % 2 + 2 * (row / 8) + 4 * (column / 8));
}

inline float of_b(const Brought* all, int row, int column, int word) {
  int lane = column * 4 + row % 8 / 2;
#ifdef SWAP_B
  row = row & 4 ? row ^ 8 : row;
#endif
  return half_of(all[lane].words + word, row % 2 + 2 * (row / 8));
}

inline double element(const Brought* all, int row, int column, int depth, int word) {
  double sum = 0;  // products of halves are exact; how a tensor core rounds their sum is not said
  for (int k = 0; k < depth; k++) sum += (double)of_a(all, row, k) * of_b(all, k, column, word);
  return sum;
}

}  // namespace emulated

INLINE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  int g = emulated::W.lane / 4, t = emulated::W.lane % 4;
  const emulated::Brought* all = emulated::meet("multiply_add", a[0], a[1], a[2], a[3], b0, b1);
  for (int i = 0; i < 4; i++)
    d[i] = (float)(d[i] + emulated::element(all, g + 8 * (i / 2), 2 * t + i % 2, 16, 4));
}

INLINE void multiply(u32 (&d)[2], u32 a0, u32 a1, u32 b) {
  int g = emulated::W.lane / 4, t = emulated::W.lane % 4;
  const emulated::Brought* all = emulated::meet("multiply", a0, a1, b);
  for (int i = 0; i < 2; i++)
    d[i] = emulated::pair(emulated::element(all, g + 8 * i, 2 * t, 8, 2),
                          emulated::element(all, g + 8 * i, 2 * t + 1, 8, 2));
}

INLINE i64 nearest(float x) { return std::llrint(x); }
INLINE void add(i64* place, i64 value) { *place += value; }
INLINE void set_bits(u32* place, u32 bits) { *place |= bits; }

struct Pair { float x, y; };
struct Four { u32 x, y, z, w; };
INLINE float real(u32 bits) { float x; std::memcpy(&x, &bits, 4); return x; }
INLINE u32 bits_of(float x) { u32 bits; std::memcpy(&bits, &x, 4); return bits; }
