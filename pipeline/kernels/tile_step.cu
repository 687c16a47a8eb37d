// One step of the fit on tensor cores, in three kernels:
//
//   list_gaussians  one thread per Gaussian: says which tiles its ellipse meets
//   fit_tiles       one warp per tile of 8 x 8 px: draws, takes the residual, differentiates
//   move_gaussians  one thread per Gaussian: Adam
//
// A step looks at the rows `phase`, `phase` + `stride`, ... of the picture. They are a picture of
// their own (fitting/rows.py), and all coordinates here are its; a tile is 8 px wide and 8 stride
// px high in the whole one.
//
// A tile. Its Gaussians are taken in blocks of 16. About the tile's centre the exponent of a
// Gaussian is a quadratic in the pixel's place (u, v), |u|, |v| <= 3.5, so a pixel costs two
// multiply-adds and an exp2. The weights W [16 Gaussians, 64 px] are halves, zero below
// exp(-cutoff^2 / 2), and stay in shared memory for the way back. With colours C [16, 3]:
//
//   picture   O = W' C           [64 px, 3]    floats, over all blocks
//   residual  R = O - target     [64 px, 3]    never leaves the registers
//   colours   S = W R            [16, 3]       the colours' gradient
//   slopes    T = C R'           [16, 64 px]
//   moments   M = (W * T) P      [16, 6]       sums of e = w t, times 1, u, v, u^2, u v, v^2
//
// Each line is a product on tensor cores. The moments about the Gaussian's mean follow from those
// about the tile's centre, and from them the gradient in whitened coordinates (fit.py): the sums of
// e z and of lower(e z z'), where z = L^-1 (p - mu).
//
// Halves have 11 bits and end at 65,504. So residuals are kept 256 times as large, and in T the
// colours of a Gaussian are divided by a power of two that brings them below 1. What a rounding
// does to e it does to all of its moments: nothing is lost where they cancel.
//
// Across tiles the sums are integers, of 2^-32: whatever order tiles end in, the bits are the same.
// A tile adds at most 64 px * 3 * 32 * cutoff^2 to one, the tiles of a picture no more than 2^31.
//
// Lists are bits, one per tile and Gaussian: no list is ever full, and their order is that of the
// Gaussians. A Gaussian thinner than 1/256 px, or with a value that is not finite, is in none.
#include <warp.cuh>

constexpr int TILE = 8;           // px
constexpr int WARPS = 4;          // of a block: as many tiles
constexpr int THREADS = 32 * WARPS;
constexpr int LISTED = 128;       // Gaussians of a tile at once
constexpr int KEPT = 3;           // blocks of 16 whose weights are kept, 2 kB each; others are drawn twice
constexpr int ROW = 12;           // words of a Gaussian in shared memory
constexpr float HALF_MAX = 65504;
constexpr float SHARPEST = 256;   // of 1 / px: beyond, a quadratic in floats says nothing
constexpr float GAIN = 256;       // of the residual's halves
constexpr float LARGEST = 32 * GAIN;
constexpr float FIXED = 4294967296.f;  // 2^32
constexpr float HALF_LOG2_E = 0.72134752f;
constexpr float LOG2_E = 1.44269504f;
constexpr float GROW = 1.0001f, PAD = 0.01f;  // of ellipses in lists, against rounding only

struct Step {                     // twin: tile_step.Step
  float *means, *cholesky, *colors;      // [B, N, 2], [B, N, 3], [B, N, 3]
  float *moment1, *moment2;              // [B, N, 8]
  const unsigned char* mask;             // [B, N]
  const float* target;                   // [B, whole_height, width, 4] times GAIN, the last of four is 0
  Four* seen;                            // [B, N, 2]: what tiles read of a Gaussian
  u32* bits;                             // [B, rows, columns, words], zero before a step
  i64* sums;                             // [B, N, 8], zero before a step
  u32 batch, n, words, rows, columns;    // words = ceil(n / 32); rows and columns of tiles
  int width, height, whole_height, stride, phase, whitened;
  float cutoff, least, squeeze;          // least = exp(-cutoff^2 / 2), squeeze = 1 / stride
  float scale, keep1, keep2, correct2;   // scale = 2 / (3 height width), correct2 = 1 / (1 - beta2^t)
  float rate_means, rate_shape, rate_colors, l1_colors;
  float low_x, high_x, low_y, high_y, largest, smallest;
};

INLINE float within(float x, float low, float high) {  // NaN stays NaN
  x = x < low ? low : x;
  return x > high ? high : x;
}

// A power of two above the absolute values of three colours; `inverse` of such a number.
INLINE float color_scale(float r, float g, float b) {
  float most = fmaxf(fmaxf(fabsf(r), fabsf(g)), fmaxf(fabsf(b), 1e-18f));
  return 2 * real(bits_of(most) & 0x7f800000u);
}

INLINE float inverse(float power) { return real(0x7f000000u - bits_of(power)); }

// Lists ---------------------------------------------------------------------------------------

// The Gaussian as the rows see it: mean, L^-1 = [[a, 0], [b, c]], colours as halves and the same
// below 1; and its bit in each tile that has a pixel's place between pixel centres, within the ellipse.
KERNEL(THREADS) list_gaussians(Step s) {
  u32 at = block() * THREADS + thread(), image = at / s.n, i = at - image * s.n;
  if (image >= s.batch) return;
  float x = s.means[2 * at], y = (s.means[2 * at + 1] - 0.5f - s.phase) * s.squeeze + 0.5f;
  float l11 = s.cholesky[3 * at];
  float l21 = s.cholesky[3 * at + 1] * s.squeeze, l22 = s.cholesky[3 * at + 2] * s.squeeze;
  float red = s.colors[3 * at], green = s.colors[3 * at + 1], blue = s.colors[3 * at + 2];
  float a = reciprocal(l11), c = reciprocal(l22), b = -l21 * a * c;
  float most = fabsf(x) + fabsf(y) + l11 + fabsf(l21) + l22 + fabsf(red) + fabsf(green) + fabsf(blue);
  bool drawn = s.mask[at] && l11 > 0 && l22 > 0 && most < 1e30f;  // false for NaN
  if (!drawn || a > SHARPEST || c > SHARPEST || !(fabsf(b) <= SHARPEST)) return;

  float below = inverse(color_scale(red, green, blue));
  float r = within(red, -HALF_MAX, HALF_MAX), g = within(green, -HALF_MAX, HALF_MAX);
  u32 last = halves(within(blue, -HALF_MAX, HALF_MAX), blue * below);
  s.seen[2 * at] = {bits_of(x), bits_of(y), bits_of(a), bits_of(b)};
  s.seen[2 * at + 1] = {bits_of(c), halves(r, g), halves(red * below, green * below), last};

  // With (p, q) the unit vector along (l21, l22), of length `up`: rows between two places are a
  // strip of z, the ellipse is a disc of z, and x goes along z1.
  float up = root(l21 * l21 + l22 * l22), down = reciprocal(up), p = l21 * down, q = l22 * down;
  float radius = s.cutoff * GROW;
  float reach = radius * up + PAD;
  int first = (int)within(ceilf((y - reach - 7.5f) / TILE), 0, s.rows);
  int end = (int)within(floorf((y + reach - 0.5f) / TILE), -1, s.rows - 1);
  u32* bits = s.bits + (i64)image * s.rows * s.columns * s.words + i / 32;
  for (int row = first; row <= end; row++) {
    float low = within((row * TILE + 0.5f - y - PAD) * down, -radius, radius);
    float high = within((row * TILE + 7.5f - y + PAD) * down, -radius, radius);
    float right = within(p * radius, low, high), left = within(-p * radius, low, high);
    right = p * right + q * root(fmaxf(radius * radius - right * right, 0));
    left = p * left - q * root(fmaxf(radius * radius - left * left, 0));
    int from = (int)within(ceilf((x + l11 * left - PAD - 7.5f) / TILE), 0, s.columns);
    int to = (int)within(floorf((x + l11 * right + PAD - 0.5f) / TILE), -1, s.columns - 1);
    u32* word = bits + (i64)(row * s.columns + from) * s.words;
    for (int k = from; k <= to; k++, word += s.words) set_bits(word, 1u << (i & 31));
  }
}

// Tiles ---------------------------------------------------------------------------------------

struct WarpMemory {
  // Of the 32 Gaussians in work: words 0 to 5 the quadratic, 6 and 7 the colours, 10 and 11 the
  // colours below 1. On the way back words 0 to 9 are moments and sums of colours.
  Four rows[32][ROW / 4];
  Four weights[KEPT][4][32];  // as they are in the registers, w[4 k] to w[4 k + 3]
  u16 list[LISTED];
};

struct BlockMemory {
  WarpMemory warps[WARPS];
};

// A Gaussian about a tile's centre: L^-1, and z at the centre.
struct Local {
  float a, b, c, z1, z2;
};

// Puts the numbers of the bits from word `first` on into `list` [LISTED], as many words as it
// holds; the next word, and how many numbers.
INLINE int fill(const u32* bits, int words, int first, int lane, u16* list, int& count) {
  count = 0;
  while (first < words) {
    u32 word = first + lane < words ? bits[first + lane] : 0;
    if (lanes_with(word != 0) == 0) {
      first += 32;
      continue;
    }
    int own = bits_set(word), end = own;
    for (int by = 1; by < 32; by *= 2) {
      int below = of_lane_below(end, by);
      end += lane >= by ? below : 0;
    }
    int taken = bits_set(lanes_with(count + end <= LISTED));  // words, from the first on
    int place = count + end - own;
    if (lane < taken)
      for (; word; word &= word - 1) list[place++] = (u16)(32 * (first + lane) + first_bit(word));
    if (taken == 0) break;
    count += of_lane(end, taken - 1);
    first += taken;
    if (taken < 32) break;
  }
  sync_warp();
  return first;
}

// Row `lane` for the Gaussian `seen` [2] in the tile with centre (x, y): its exponent in base 2,
// A u^2 + B u v + C v^2 + D u + E v + F, and its colours. Rows that are not there are zero.
INLINE Local prepare(const Four* seen, float x, float y, Four* row) {
  Local local = {};
  Four row0 = {}, row1 = {}, row2 = {};
  row1.y = bits_of(-1000.f);
  if (seen) {
    Four one = seen[0], two = seen[1];
    float a = real(one.z), b = real(one.w), c = real(two.x);
    float dx = x - real(one.x), dy = y - real(one.y);
    float z1 = a * dx, z2 = b * dx + c * dy;
    local = {a, b, c, z1, z2};
    row0.x = bits_of(-HALF_LOG2_E * (a * a + b * b));
    row0.y = bits_of(-2 * HALF_LOG2_E * b * c);
    row0.z = bits_of(-HALF_LOG2_E * c * c);
    row0.w = bits_of(-2 * HALF_LOG2_E * (a * z1 + b * z2));
    row1.x = bits_of(-2 * HALF_LOG2_E * c * z2);
    row1.y = bits_of(-HALF_LOG2_E * (z1 * z1 + z2 * z2));
    row1.z = two.y;
    row1.w = two.w & 0xffffu;
    row2.z = two.z;
    row2.w = two.w >> 16;
  }
  row[0] = row0, row[1] = row1, row[2] = row2;
  return local;
}

// Weights of 16 Gaussians at 64 px. Lane 4 g + t has Gaussians g (h = 0) and g + 8 (h = 1) at rows t
// and t + 4: w[4 k + h] at columns 2 k, 2 k + 1 of row t, w[4 k + 2 + h] of row t + 4. So for each k
// w[4 k] to w[4 k + 3] are a of `multiply_add`: Gaussians x 16 px, pixel 2 row + column - 2 k.
INLINE void draw(const Four (*rows)[ROW / 4], int g, int t, u32 least, u32 (&w)[16]) {
  float v0 = t - 3.5f, v1 = t + 0.5f;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Four row0 = rows[g + 8 * h][0], row1 = rows[g + 8 * h][1];
    float A = real(row0.x), B = real(row0.y), C = real(row0.z), D = real(row0.w);
    float E = real(row1.x), F = real(row1.y);
    float slope0 = B * v0 + D, slope1 = B * v1 + D;
    float base0 = (C * v0 + E) * v0 + F, base1 = (C * v1 + E) * v1 + F;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float u0 = 2 * k - 3.5f, u1 = 2 * k - 2.5f;
      u32 upper = halves(ex2((A * u0 + slope0) * u0 + base0), ex2((A * u1 + slope0) * u1 + base0));
      u32 lower = halves(ex2((A * u0 + slope1) * u0 + base1), ex2((A * u1 + slope1) * u1 + base1));
      w[4 * k + h] = at_least(upper, least);
      w[4 * k + 2 + h] = at_least(lower, least);
    }
  }
}

// picture [4][16 px, channels] += weights' colours, of 16 Gaussians.
INLINE void add_block(float (&picture)[4][4], const u32 (&w)[16], const Four (*rows)[ROW / 4], int g, int t) {
  u32 b0 = 0, b1 = 0;  // colours [Gaussian, channel]: channel g
  if (g < 4) {
    const u16* color = (const u16*)&rows[0][1].z + g;
    constexpr int NEXT = 2 * ROW;  // u16 to the next Gaussian
    b0 = color[2 * t * NEXT] | (u32)color[(2 * t + 1) * NEXT] << 16;
    b1 = color[(2 * t + 8) * NEXT] | (u32)color[(2 * t + 9) * NEXT] << 16;
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 a[4] = {transposed(w[4 * k]), transposed(w[4 * k + 2]), transposed(w[4 * k + 1]),
                transposed(w[4 * k + 3])};
    multiply_add(picture[k], a, b0, b1);
  }
}

// Rendering less target at 64 px, times GAIN, as halves: residual[2 k + r] has pixel (row, column)
// ((g >> 1) + 4 r, 2 k + (g & 1)) and channels 2 t, 2 t + 1. Zero outside of the picture.
INLINE void subtract_target(const Step& s, const float (&picture)[4][4], u32 image, int top, int left,
                            int g, int t, u32 (&residual)[8]) {
  int y = top + (g >> 1), x = left + (g & 1);
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = y + 4 * r, column = x + 2 * k;
      float first = 0, second = 0;
      if (t < 2 && row < s.height && column < s.width) {
        i64 pixel = ((i64)image * s.whole_height + row * s.stride + s.phase) * s.width + column;
        Pair target = *(const Pair*)(s.target + 4 * pixel + 2 * t);
        first = within(GAIN * picture[k][2 * r] - target.x, -LARGEST, LARGEST);
        second = within(GAIN * picture[k][2 * r + 1] - target.y, -LARGEST, LARGEST);
      }
      residual[2 * k + r] = halves(first, second);
    }
  }
}

// 1, u, v, u^2, u v, v^2 at 64 px, exact in halves: powers[2 k] and powers[2 k + 1] are b0 and b1 of
// `multiply_add`, pixels x moments.
INLINE void moments_of_pixels(int g, int t, u32 (&powers)[8]) {
  float v0 = t - 3.5f, v1 = t + 0.5f;
  bool linear_v = g == 2 || g == 4;
  float of_v0 = linear_v ? v0 : g == 5 ? v0 * v0 : g > 5 ? 0 : 1;
  float of_v1 = linear_v ? v1 : g == 5 ? v1 * v1 : g > 5 ? 0 : 1;
  u32 upper = halves(of_v0, of_v0), lower = halves(of_v1, of_v1);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    float u0 = 2 * k - 3.5f, u1 = 2 * k - 2.5f;
    u32 one = halves(u0, u1), square = halves(u0 * u0, u1 * u1);
    u32 of_u = g == 1 || g == 4 ? one : g == 3 ? square : 0x3c003c00u;
    powers[2 * k] = times(of_u, upper);
    powers[2 * k + 1] = times(of_u, lower);
  }
}

// Moments and sums of colours of 16 Gaussians into words 0 to 5 and 6 to 8 of their rows.
INLINE void differentiate(const u32 (&w)[16], const u32 (&residual)[8], const u32 (&channels)[8],
                          const u32 (&powers)[8], Four (*rows)[ROW / 4], int g, int t) {
  float moments[4] = {}, colors[4] = {};
  u32 near0 = t < 2 ? (&rows[g][2].z)[t] : 0, near1 = t < 2 ? (&rows[g + 8][2].z)[t] : 0;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 upper[2], lower[2];
    multiply(upper, near0, near1, residual[2 * k]);
    multiply(lower, near0, near1, residual[2 * k + 1]);
    u32 e[4] = {times(w[4 * k], upper[0]), times(w[4 * k + 1], upper[1]),
                times(w[4 * k + 2], lower[0]), times(w[4 * k + 3], lower[1])};
    u32 weights[4] = {w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]};
    multiply_add(moments, e, powers[2 * k], powers[2 * k + 1]);
    multiply_add(colors, weights, channels[2 * k], channels[2 * k + 1]);
  }
  sync_warp();
  Pair *row0 = (Pair*)rows[g], *row1 = (Pair*)rows[g + 8];
  if (t < 3) row0[t] = {moments[0], moments[1]}, row1[t] = {moments[2], moments[3]};
  if (t < 2) row0[3 + t] = {colors[0], colors[1]}, row1[3 + t] = {colors[2], colors[3]};
}

// A row's moments about the tile's centre to sums of e z, lower(e z z') and colours, in words 0 to 7.
INLINE void about_mean(const Local& l, Four* row) {
  Four row0 = row[0], row1 = row[1], row2 = row[2];
  float e = real(row0.x), eu = real(row0.y), ev = real(row0.z), euu = real(row0.w);
  float euv = real(row1.x), evv = real(row1.y);
  float a1 = l.a * eu, a2 = l.b * eu + l.c * ev;
  float sum1 = l.z1 * e + a1, sum2 = l.z2 * e + a2;
  float sum11 = l.z1 * (sum1 + a1) + l.a * l.a * euu;
  float sum21 = l.z1 * sum2 + l.a * (l.z2 * eu + l.b * euu + l.c * euv);
  float sum22 = l.z2 * (sum2 + a2) + l.b * (l.b * euu + 2 * l.c * euv) + l.c * l.c * evv;
  row[0] = {bits_of(sum1), bits_of(sum2), bits_of(sum11), bits_of(sum21)};
  row[1] = {bits_of(sum22), row1.z, row1.w, row2.x};
}

KERNEL(THREADS) fit_tiles(Step s) {
  int lane = thread() & 31, warp = thread() >> 5, g = lane >> 2, t = lane & 3;
  u32 tile = block() * WARPS + warp, row = tile / s.columns, image = row / s.rows;
  if (image >= s.batch) return;
  int left = (tile - row * s.columns) * TILE, top = (row - image * s.rows) * TILE;
  const u32* bits = s.bits + (i64)tile * s.words;
  const Four* seen = s.seen + (i64)image * s.n * 2;
  WarpMemory& memory = shared<BlockMemory>().warps[warp];
  i64* sums = s.sums + (i64)image * s.n * 8 + (lane & 7);
  u32 least = halves(s.least, s.least);

  auto local = [&](int first, int count) {
    const Four* one = first + lane < count ? seen + 2 * memory.list[first + lane] : nullptr;
    Local found = prepare(one, left + 4.f, top + 4.f, memory.rows[lane]);
    sync_warp();
    return found;
  };

  float picture[4][4] = {};
  int blocks = 0, count, next = 0, words = s.words;
  bool again = false;  // whether the list was filled more than once, which is rare
  do {
    next = fill(bits, words, next, lane, memory.list, count);
    again |= next < words;
    for (int first = 0; first < count; first += 32) {
      local(first, count);
      for (int half = 0; half < 32 && first + half < count; half += 16, blocks++) {
        u32 w[16];
        draw(memory.rows + half, g, t, least, w);
        add_block(picture, w, memory.rows + half, g, t);
        if (blocks < KEPT)
          for (int k = 0; k < 4; k++)
            memory.weights[blocks][k][lane] = {w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]};
      }
      sync_warp();
    }
  } while (next < words);
  if (blocks == 0) return;

  u32 residual[8], channels[8], powers[8];
  subtract_target(s, picture, image, top, left, g, t, residual);
  for (int k = 0; k < 8; k++) channels[k] = transposed(residual[k]);
  moments_of_pixels(g, t, powers);

  blocks = 0, next = again ? 0 : words;
  do {
    if (again) next = fill(bits, words, next, lane, memory.list, count);
    for (int first = 0; first < count; first += 32) {
      Local own = local(first, count);
      for (int half = 0; half < 32 && first + half < count; half += 16, blocks++) {
        u32 w[16];
        if (blocks < KEPT) {
          for (int k = 0; k < 4; k++) {
            Four kept = memory.weights[blocks][k][lane];
            w[4 * k] = kept.x, w[4 * k + 1] = kept.y, w[4 * k + 2] = kept.z, w[4 * k + 3] = kept.w;
          }
        } else {
          draw(memory.rows + half, g, t, least, w);
        }
        differentiate(w, residual, channels, powers, memory.rows + half, g, t);
      }
      sync_warp();
      about_mean(own, memory.rows[lane]);
      sync_warp();
#pragma unroll
      for (int k = 0; k < 32; k += 4) {  // 8 lanes per Gaussian
        if (first + k + lane / 8 >= count) break;
        float sum = real((&memory.rows[k + lane / 8][0].x)[lane & 7]);
        add(sums + 8 * memory.list[first + k + lane / 8], nearest(sum * (FIXED / GAIN)));
      }
      sync_warp();
    }
  } while (next < words);
}

// Adam ----------------------------------------------------------------------------------------

INLINE float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : 0.f; }

// The twin of `fit.TorchStep.step`, from sums to moved Gaussians.
KERNEL(THREADS) move_gaussians(Step s) {
  u32 at = block() * THREADS + thread();
  if (at >= s.batch * s.n) return;
  float *mean = s.means + 2 * at, *l = s.cholesky + 3 * at, *color = s.colors + 3 * at;
  i64* sums = s.sums + 8 * (i64)at;
  float *moment1 = s.moment1 + 8 * (i64)at, *moment2 = s.moment2 + 8 * (i64)at;
  float scale = s.scale / FIXED;
  float shape_scale = scale * color_scale(color[0], color[1], color[2]);
  float gradient[8];
  bool drawn = false;
  for (int k = 0; k < 8; k++) {
    drawn |= sums[k] != 0;
    gradient[k] = sums[k] == 0 ? 0 : (float)sums[k] * (k < 5 ? shape_scale : scale);
  }
  float l11 = l[0], l21 = l[1], l22 = l[2];
  if (!s.whitened && drawn) {  // the same in the rows' picture and in the whole one
    float a = reciprocal(l11), c = reciprocal(l22), b = -l21 * a * c;
    gradient[0] = a * gradient[0] + b * gradient[1], gradient[1] *= c;
    gradient[2] = a * gradient[2] + b * gradient[3], gradient[3] *= c, gradient[4] *= c;
  }
  float step[8];
  for (int k = 0; k < 8; k++) {
    float slope = gradient[k] + (k < 5 ? 0 : s.l1_colors * sign(color[k - 5]));
    float first = moment1[k] + (1 - s.keep1) * (slope - moment1[k]);
    float second = moment2[k] + (1 - s.keep2) * (slope * slope - moment2[k]);
    moment1[k] = first, moment2[k] = second;
    float rate = k < 2 ? s.rate_means : k < 5 ? s.rate_shape : s.rate_colors;
    step[k] = -rate * first * reciprocal(root(second * s.correct2) + 1e-12f);
  }
  for (int k = 0; k < 3; k++) color[k] += step[5 + k];
  float x = mean[0], y = mean[1];
  if (s.whitened) {
    x += l11 * step[0], y += l21 * step[0] + l22 * step[1];
    float grow = ex2(step[2] * LOG2_E);
    l21 = l21 * grow + l22 * step[3], l11 *= grow, l22 *= ex2(step[4] * LOG2_E);
  } else {
    x += step[0], y += step[1], l21 += step[3];
    l11 = within(l11 + step[2], s.smallest, s.largest);
    l22 = within(l22 + step[4], s.smallest, s.largest);
  }
  mean[0] = within(x, s.low_x, s.high_x), mean[1] = within(y, s.low_y, s.high_y);
  l[0] = within(l11, -s.largest, s.largest);
  l[1] = within(l21, -s.largest, s.largest);
  l[2] = within(l22, -s.largest, s.largest);
}
