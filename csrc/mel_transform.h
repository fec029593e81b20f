// The transform of the mel kernel: one frame, 2048 samples, by one warp. 1024 complex points, pairs of samples, as 32 x
// 32: point 32 n1 + n2 is in lane n2, the column; a DFT over n1 in the registers of each lane; an exchange, after which
// lane k1 has a row; a DFT over n2, after which it has bins k1 + 32 k2; the split into the bins of the real transform.
//
// The DFTs have radix 2 and are in place, from bit-reversed to natural order. A butterfly a +- w b with w = c (1 - i
// t), t a tangent, is six multiply-adds (Linzer and Feig, 1993). The twiddle factors between the passes add nothing to
// the second one: a factor theta^n of input n of a DFT is one of the butterflies in each stage, where others are
// already.
#pragma once

#include "mel_device.h"
#include "mel_math.h"

namespace singerembed {

constexpr int kWarp = 32;
constexpr int kPoints = kFftSize / 2;
static_assert(kWarp * kWarp == kPoints);

struct Points {  // of a lane
  float re[kWarp], im[kWarp];
};

struct Turn {  // cos (1 - i tan) = exp(-i angle)
  float cos, tan;
};

#if defined(__CUDA_ARCH__)
SE_HD Quad load_quad(const Quad* p) {  // of memory that no kernel of the launch writes
  const float4 quad = __ldg(reinterpret_cast<const float4*>(p));
  return {quad.x, quad.y, quad.z, quad.w};
}
#else
SE_HD Quad load_quad(const Quad* p) { return *p; }
#endif

// Of the rows of the table, in which the quads of a lane have a stride of a warp.
constexpr int kWindowQuad = 0, kRowQuad = 8, kSplitQuad = 16;

SE_HD constexpr int reversed(int n) {  // of five bits
  return (n & 1) << 4 | (n & 2) << 2 | (n & 4) | (n & 8) >> 2 | (n & 16) >> 4;
}

// Replaces points a and b by a + w b and a - w b, w = exp(-i angle).
SE_HD void butterfly(Points& x, int a, int b, Turn turn) {
  const float re = x.re[b] + turn.tan * x.im[b], im = x.im[b] - turn.tan * x.re[b];
  x.re[b] = x.re[a] - turn.cos * re;
  x.im[b] = x.im[a] - turn.cos * im;
  x.re[a] += turn.cos * re;
  x.im[a] += turn.cos * im;
}

// The same with -i w in the place of w.
SE_HD void butterfly_minus_i(Points& x, int a, int b, Turn turn) {
  const float re = x.re[b] + turn.tan * x.im[b], im = x.im[b] - turn.tan * x.re[b];
  x.re[b] = x.re[a] - turn.cos * im;
  x.im[b] = x.im[a] + turn.cos * re;
  x.re[a] += turn.cos * im;
  x.im[a] -= turn.cos * re;
}

// The butterflies j and j + half / 2 of each DFT of a stage, whose DFTs have 2 `half` points.
template <int half>
SE_HD void turned_butterflies(Points& x, int j, Turn turn) {
  SE_UNROLL
  for (int first = j; first < kWarp; first += 2 * half) {
    butterfly(x, first, first + half, turn);
    butterfly_minus_i(x, first + half / 2, first + half / 2 + half, turn);
  }
}

template <int half>
SE_HD void column_stage(Points& x) {
  // (cos, tan)(2 pi j / 32). Local, because device code can read only local constexpr arrays; the loops are unrolled,
  // so that each entry becomes an immediate.
  constexpr Turn turns[8] = {{1.0f, 0.0f},
                             {0.98078528040323044913f, 0.19891236737965800691f},
                             {0.92387953251128675613f, 0.41421356237309504880f},
                             {0.83146961230254523708f, 0.66817863791929891999f},
                             {0.70710678118654752440f, 1.0f},
                             {0.55557023301960222474f, 1.49660576266548901760f},
                             {0.38268343236508977173f, 2.41421356237309504880f},
                             {0.19509032201612826785f, 5.02733949212584810451f}};
  SE_UNROLL
  for (int first = 0; first < kWarp; first += 2 * half) {  // butterflies 0 and half / 2, without factors
    const int a = first, b = a + half, c = a + half / 2, d = c + half;
    const float b_re = x.re[b], b_im = x.im[b], d_re = x.re[d], d_im = x.im[d];
    x.re[b] = x.re[a] - b_re;
    x.im[b] = x.im[a] - b_im;
    x.re[a] += b_re;
    x.im[a] += b_im;
    x.re[d] = x.re[c] - d_im;
    x.im[d] = x.im[c] + d_re;
    x.re[c] += d_im;
    x.im[c] -= d_re;
  }
  SE_UNROLL
  for (int j = 1; j < half / 2; ++j) turned_butterflies<half>(x, j, turns[j * kWarp / (2 * half)]);
}

// x0 (1 + t) + x1 (1 - t) and x0 (1 + t) - x1 (1 - t).
SE_HD void windowed_butterfly(float& x0, float& x1, float t) {
  const float sum = x0 + x1, difference = x0 - x1;
  x0 = sum + t * difference;
  x1 = difference + t * sum;
}

// Window and DFT over n1, in place. `table` is that of the lane. In: raw samples, point n1 of the column at
// reversed(n1). Out: k1 at k1. The window is twice Hann's: 1 + t with a negative cosine t, which changes its sign half
// a frame on, where a butterfly has its other point.
SE_HD void transform_column(const Quad* table, Points& x) {
  SE_UNROLL
  for (int n1 = 0; n1 < 8; ++n1) {
    const Quad t = load_quad(table + kWarp * (kWindowQuad + n1));
    const int a = reversed(n1), b = reversed(n1 + 8);
    windowed_butterfly(x.re[a], x.re[a + 1], t.a);  // points n1 and n1 + 16
    windowed_butterfly(x.im[a], x.im[a + 1], t.b);
    windowed_butterfly(x.re[b], x.re[b + 1], t.c);
    windowed_butterfly(x.im[b], x.im[b + 1], t.d);
  }
  column_stage<2>(x);
  column_stage<4>(x);
  column_stage<8>(x);
  column_stage<16>(x);
}

// Butterflies j and j + 1 of a stage of the row, whose turns are the pair number `pair`.
template <int half>
SE_HD void row_butterflies(const Quad* table, int pair, int j, Points& x) {
  const Quad two = load_quad(table + kWarp * (kRowQuad + pair));
  turned_butterflies<half>(x, j, {two.a, two.b});
  turned_butterflies<half>(x, j + 1, {two.c, two.d});
}

// Twiddle factors and DFT over n2, in place. In: n2 at reversed(n2); out: k2 at k2.
SE_HD void transform_row(const Quad* table, Points& x) {
  const Quad two = load_quad(table + kWarp * kRowQuad);
  SE_UNROLL
  for (int i = 0; i < kWarp; i += 2) butterfly(x, i, i + 1, {two.a, two.b});
  turned_butterflies<2>(x, 0, {two.c, two.d});
  row_butterflies<4>(table, 1, 0, x);
  row_butterflies<8>(table, 2, 0, x);
  row_butterflies<8>(table, 3, 2, x);
  row_butterflies<16>(table, 4, 0, x);
  row_butterflies<16>(table, 5, 2, x);
  row_butterflies<16>(table, 6, 4, x);
  row_butterflies<16>(table, 7, 6, x);
}

// |2 X[k]|^2 and |2 X[kPoints - k]|^2 of the real transform X from the complex one Z, in which z is Z[k] and `mirror`
// Z[kPoints - k]: X[k] = E + W O and X[kPoints - k] = conj(E - W O), with 2 E = Z[k] + conj Z[kPoints - k], 2 i O =
// Z[k] - conj Z[kPoints - k], W = exp(-2 pi i k / kFftSize). For k = 0 pass Z[0] twice, which gives bins 0 and kPoints.
SE_HD void split_powers(Complex<float> z, Complex<float> mirror, Turn turn, float& power, float& mirror_power) {
  const Complex<float> even = {z.re + mirror.re, z.im - mirror.im}, odd = {z.im + mirror.im, mirror.re - z.re};
  const float re = odd.re + turn.tan * odd.im, im = odd.im - turn.tan * odd.re;
  const Complex<float> x = {even.re + turn.cos * re, even.im + turn.cos * im};
  const Complex<float> x_mirror = {even.re - turn.cos * re, even.im - turn.cos * im};
  power = x.re * x.re + x.im * x.im;
  mirror_power = x_mirror.re * x_mirror.re + x_mirror.im * x_mirror.im;
}

}  // namespace singerembed
