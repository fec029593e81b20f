// The transform of the mel kernel: one frame, 2048 samples, by one warp. 1024 complex points (pairs of samples) as
// 32 x 32: point 32 n1 + n2 lies in lane n2 = the column; a DFT over n1 in the registers of each lane; an exchange through
// shared memory; a DFT over n2 in lane k1 = the row, after which it has bins k1 + 32 k2; the split into bins of the real
// transform.
//
// All DFTs are of radix 2, in place, from bit-reversed to natural order. A butterfly a +- w b with w = c (1 - i t),
// t a tangent, is six multiply-adds (Linzer and Feig, 1993). The twiddle factors between the passes cost nothing more: a
// factor theta^n on input n of a DFT is a factor of a butterfly in each of its stages (row_turns).
#pragma once

#include "mel_device.h"
#include "mel_math.h"

namespace singerembed {

constexpr int kWarp = 32;
constexpr int kPoints = kFftSize / 2;
constexpr int kColumnPoints = kPoints / kWarp;

// In points. A lane reads its row in pairs of points, of which eight lanes take all banks with this stride.
constexpr int kRowStride = kWarp + 2;
constexpr int kExchangeWords = 2 * kWarp * kRowStride;

static_assert(kWarp == kColumnPoints);

#if defined(__CUDA_ARCH__)
SE_HD Quad load_quad(const Quad* p) {
  const float4 quad = __ldg(reinterpret_cast<const float4*>(p));
  return {quad.x, quad.y, quad.z, quad.w};
}
#else
SE_HD Quad load_quad(const Quad* p) { return *p; }
#endif

using Point = Complex<float>;

struct Turn {  // c (1 - i t) = exp(-i angle)
  float cos, tan;
};

SE_HD constexpr int reversed(int n) {  // of five bits
  return (n & 1) << 4 | (n & 2) << 2 | (n & 4) | (n & 8) >> 2 | (n & 16) >> 4;
}

// a + w b and a - w b, for w = c (1 - i t).
SE_HD void butterfly(Point& a, Point& b, float c, float t) {
  const Point turned = {b.re + t * b.im, b.im - t * b.re};
  b = {a.re - c * turned.re, a.im - c * turned.im};
  a = {a.re + c * turned.re, a.im + c * turned.im};
}

// The same for -i w.
SE_HD void butterfly_minus_i(Point& a, Point& b, float c, float t) {
  const Point turned = {b.re + t * b.im, b.im - t * b.re};
  b = {a.re - c * turned.im, a.im + c * turned.re};
  a = {a.re + c * turned.im, a.im - c * turned.re};
}

// Butterflies of one stage over pairs `half` apart, turn j by turns(j) and, half a stage further on, by -i turns(j).
template <int half, class Turns>
SE_HD void turned_butterflies(Point (&x)[kWarp], int j, const Turns& turn) {
  SE_UNROLL
  for (int first = 0; first < kWarp; first += 2 * half) {
    butterfly(x[first + j], x[first + j + half], turn.cos, turn.tan);
    butterfly_minus_i(x[first + j + half / 2], x[first + j + half / 2 + half], turn.cos, turn.tan);
  }
}

template <int half>
SE_HD void column_stage(Point (&x)[kWarp]) {
  // (cos, tan)(2 pi j / 32). Local, because device code can read only local constexpr arrays; the loops are unrolled, so
  // that each entry becomes an immediate.
  constexpr Turn turns[8] = {{1.0f, 0.0f},
                             {0.98078528040323044913f, 0.19891236737965800691f},
                             {0.92387953251128675613f, 0.41421356237309504880f},
                             {0.83146961230254523708f, 0.66817863791929891999f},
                             {0.70710678118654752440f, 1.0f},
                             {0.55557023301960222474f, 1.49660576266548901760f},
                             {0.38268343236508977173f, 2.41421356237309504880f},
                             {0.19509032201612826785f, 5.02733949212584810451f}};
  SE_UNROLL
  for (int first = 0; first < kWarp; first += 2 * half) {
    Point &a = x[first], &b = x[first + half], &c = x[first + half / 2], &d = x[first + half / 2 + half];
    const Point turned = times_minus_i(d), old_a = a, old_c = c;
    a = old_a + b;
    b = old_a - b;
    c = old_c + turned;
    d = old_c - turned;
  }
  SE_UNROLL
  for (int j = 1; j < half / 2; ++j) turned_butterflies<half>(x, j, turns[j * kWarp / (2 * half)]);
}

// Window and DFT over n1 of a column, in place. In: point n1 at x[reversed(n1)], of raw samples. Out: 4 times the windowed
// transform, k1 at x[k1]. The window is 1 + t for a point and 1 - t for the one half a frame on, t the table's negative
// cosine: so the first stage is x0 (1 + t) +- x1 (1 - t) = (u + t v, v + t u), with u = x0 + x1, v = x0 - x1.
SE_HD void transform_column(const Quad* window, int lane, Point (&x)[kWarp]) {
  SE_UNROLL
  for (int n1 = 0; n1 < 8; ++n1) {
#ifdef SE_WINDOW_COMPUTE
    const Quad base = load_quad(window + lane);  // cos, sin of both samples
    constexpr float cosines_of[8] = {1.0f, 0.98078528040323044913f, 0.92387953251128675613f, 0.83146961230254523708f,
                                     0.70710678118654752440f, 0.55557023301960222474f, 0.38268343236508977173f,
                                     0.19509032201612826785f};
    constexpr float sines_of[8] = {0.0f, 0.19509032201612826785f, 0.38268343236508977173f, 0.55557023301960222474f,
                                   0.70710678118654752440f, 0.83146961230254523708f, 0.92387953251128675613f,
                                   0.98078528040323044913f};
    const float cos = cosines_of[n1], sin = sines_of[n1];
    const float t[4] = {sin * base.b - cos * base.a, sin * base.d - cos * base.c, sin * base.a + cos * base.b,
                        sin * base.c + cos * base.d};
    const Quad cosines = {t[0], t[1], t[2], t[3]};
#else
    const Quad cosines = load_quad(window + kWarp * n1 + lane);
#endif
    const auto windowed = [&](Point& x0, Point& x1, float t_re, float t_im) {
      const Point u = x0 + x1, v = x0 - x1;
      x0 = {u.re + t_re * v.re, u.im + t_im * v.im};
      x1 = {v.re + t_re * u.re, v.im + t_im * u.im};
    };
    windowed(x[reversed(n1)], x[reversed(n1 + 16)], cosines.a, cosines.b);
    windowed(x[reversed(n1 + 8)], x[reversed(n1 + 24)], cosines.c, cosines.d);
  }
  column_stage<2>(x);
  column_stage<4>(x);
  column_stage<8>(x);
  column_stage<16>(x);
}

// DFT over n2 of a row, with its twiddle factors, in place. In: n2 at x[reversed(n2)]; out: k2 at x[k2].
SE_HD void transform_row(const Quad* turns, int lane, Point (&x)[kWarp]) {
  Quad two = load_quad(turns + lane);
  SE_UNROLL
  for (int i = 0; i < kWarp; i += 2) butterfly(x[i], x[i + 1], two.a, two.b);
  turned_butterflies<2>(x, 0, Turn{two.c, two.d});
  two = load_quad(turns + kWarp + lane);
  turned_butterflies<4>(x, 0, Turn{two.a, two.b});
  turned_butterflies<4>(x, 1, Turn{two.c, two.d});
  SE_UNROLL
  for (int j = 0; j < 4; j += 2) {
    two = load_quad(turns + kWarp * (2 + j / 2) + lane);
    turned_butterflies<8>(x, j, Turn{two.a, two.b});
    turned_butterflies<8>(x, j + 1, Turn{two.c, two.d});
  }
  SE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    two = load_quad(turns + kWarp * (4 + j / 2) + lane);
    turned_butterflies<16>(x, j, Turn{two.a, two.b});
    turned_butterflies<16>(x, j + 1, Turn{two.c, two.d});
  }
}

SE_HD float squared(Point x) { return x.re * x.re + x.im * x.im; }

// 4 |X[k]|^2 and 4 |X[kPoints - k]|^2 of the real transform from the complex one: X[k] = E + W O, X[kPoints - k] =
// conj(E - W O), with 2 E = Z[k] + conj Z[kPoints - k], 2 i O = Z[k] - conj Z[kPoints - k], W = exp(-2 pi i k / kFftSize).
// For k = 0 pass Z[0] twice, which gives bins 0 and kPoints.
SE_HD void split_powers(Point z, Point mirror, Turn turn, float& power, float& mirror_power) {
  Point x = {z.re + mirror.re, z.im - mirror.im}, x_mirror = {z.im + mirror.im, mirror.re - z.re};
  butterfly(x, x_mirror, turn.cos, turn.tan);
  power = squared(x);
  mirror_power = squared(x_mirror);
}

}  // namespace singerembed
