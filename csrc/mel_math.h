// Arithmetic of the mel front end, shared by all targets: V is float in a CUDA thread, and on the CPU a vector with one
// frame per lane. Nothing here allocates or branches on data.
#pragma once

#include <cfloat>
#include <cmath>

#include "mel.h"

#ifdef __CUDACC__
#define SE_HD static __host__ __device__ __forceinline__
#else
// Internal linkage and forced inlining: the CPU sources are compiled for different instruction sets, and a shared
// out-of-line copy could use instructions that the processor does not have.
#define SE_HD static inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define SE_UNROLL _Pragma("unroll")
#define SE_NO_UNROLL _Pragma("unroll 1")
#elif defined(__CUDACC__)  // nvcc's host pass supports neither form, and runs none of the loops
#define SE_UNROLL
#else
#define SE_UNROLL _Pragma("GCC unroll 32")
#endif
#ifndef SE_NO_UNROLL
#define SE_NO_UNROLL
#endif

namespace singerembed {

SE_HD int smaller(int a, int b) { return a < b ? a : b; }

SE_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);  // one instruction
#else
  return a > b ? a : b;
#endif
}

// Level and state of a crop from sums over its samples, in their unit (int16, or full scale 1).
SE_HD CropLevel crop_level(float peak, double sum_squares, bool finite, float full_scale, int n, float silence_peak) {
  if (!finite) return {NAN, NAN, CropState::kInvalid};
  const float rms = static_cast<float>(std::sqrt(sum_squares / n) / full_scale);
  // A subnormal peak has no finite reciprocal; no recording is that quiet.
  const bool silent = peak / full_scale <= silence_peak || peak < FLT_MIN;
  return {peak / full_scale, rms, silent ? CropState::kSilent : CropState::kLoud};
}

// Index into a crop of n samples for sample i of the signal reflected about its first and last samples (which are not
// repeated), -n < i < 2n - 1.
SE_HD int reflect(int i, int n) {
  i = i < 0 ? -i : i;
  return i < n ? i : 2 * (n - 1) - i;
}

template <class V>
struct Complex {
  V re, im;
};

template <class V>
SE_HD Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
SE_HD Complex<V> operator-(Complex<V> a, Complex<V> b) {
  return {a.re - b.re, a.im - b.im};
}

template <class V>
SE_HD Complex<V> times(Complex<V> a, float re, float im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

template <class V>
SE_HD Complex<V> times_minus_i(Complex<V> a) {
  return {a.im, -a.re};
}

// a * exp(-i pi / 4) and a * exp(-3 i pi / 4)
template <class V>
SE_HD Complex<V> times_w8(Complex<V> a) {
  constexpr float r = 0.70710678118654752440f;
  return {(a.re + a.im) * r, (a.im - a.re) * r};
}

template <class V>
SE_HD Complex<V> times_w8_cubed(Complex<V> a) {
  constexpr float r = 0.70710678118654752440f;
  return {(a.im - a.re) * r, (a.re + a.im) * -r};
}

// In place: x[k] = sum_n x[n] exp(-2 pi i n k / 4), in natural order.
template <class V>
SE_HD void dft4(Complex<V>& x0, Complex<V>& x1, Complex<V>& x2, Complex<V>& x3) {
  const Complex<V> s02 = x0 + x2, d02 = x0 - x2;
  const Complex<V> s13 = x1 + x3, d13 = times_minus_i(x1 - x3);
  x0 = s02 + s13;
  x1 = d02 + d13;
  x2 = s02 - s13;
  x3 = d02 - d13;
}

// In place: x[k] = sum_n x[n] exp(-2 pi i n k / 8), in natural order, from two DFTs of four points (even and odd n).
template <class V>
SE_HD void dft8(Complex<V> (&x)[8]) {
  dft4(x[0], x[2], x[4], x[6]);
  dft4(x[1], x[3], x[5], x[7]);
  const Complex<V> e0 = x[0], e1 = x[2], e2 = x[4], e3 = x[6];
  const Complex<V> o0 = x[1], o1 = times_w8(x[3]), o2 = times_minus_i(x[5]), o3 = times_w8_cubed(x[7]);
  x[0] = e0 + o0;
  x[1] = e1 + o1;
  x[2] = e2 + o2;
  x[3] = e3 + o3;
  x[4] = e0 - o0;
  x[5] = e1 - o1;
  x[6] = e2 - o2;
  x[7] = e3 - o3;
}

constexpr int kDft32Points = 32;

// DFT of 32 points: n = 8 a + b, k = p + 4 q. `read(n)` returns the input; `write(k, value)` stores the output. All
// reads precede the first write.
template <class V, class Read, class Write>
SE_HD void dft32(Read read, Write write) {
  // (cos, -sin)(2 pi j / 32). Local, because device code can read only local constexpr arrays; the loops are unrolled,
  // so that each entry becomes an immediate.
  constexpr float turns[22][2] = {
      {1.0f, 0.0f},
      {0.98078528040323044913f, -0.19509032201612826785f},
      {0.92387953251128675613f, -0.38268343236508977173f},
      {0.83146961230254523708f, -0.55557023301960222474f},
      {0.70710678118654752440f, -0.70710678118654752440f},
      {0.55557023301960222474f, -0.83146961230254523708f},
      {0.38268343236508977173f, -0.92387953251128675613f},
      {0.19509032201612826785f, -0.98078528040323044913f},
      {0.0f, -1.0f},
      {-0.19509032201612826785f, -0.98078528040323044913f},
      {-0.38268343236508977173f, -0.92387953251128675613f},
      {-0.55557023301960222474f, -0.83146961230254523708f},
      {-0.70710678118654752440f, -0.70710678118654752440f},
      {-0.83146961230254523708f, -0.55557023301960222474f},
      {-0.92387953251128675613f, -0.38268343236508977173f},
      {-0.98078528040323044913f, -0.19509032201612826785f},
      {-1.0f, 0.0f},
      {-0.98078528040323044913f, 0.19509032201612826785f},
      {-0.92387953251128675613f, 0.38268343236508977173f},
      {-0.83146961230254523708f, 0.55557023301960222474f},
      {-0.70710678118654752440f, 0.70710678118654752440f},
      {-0.55557023301960222474f, 0.83146961230254523708f},
  };
  Complex<V> x[kDft32Points];
  SE_UNROLL
  for (int b = 0; b < 8; ++b) {
    Complex<V> v0 = read(b), v1 = read(b + 8), v2 = read(b + 16), v3 = read(b + 24);
    dft4(v0, v1, v2, v3);
    x[b] = v0;
    x[b + 8] = b == 0 ? v1 : times(v1, turns[b][0], turns[b][1]);
    x[b + 16] = b == 0 ? v2 : times(v2, turns[2 * b][0], turns[2 * b][1]);
    x[b + 24] = b == 0 ? v3 : times(v3, turns[3 * b][0], turns[3 * b][1]);
  }
  SE_UNROLL
  for (int p = 0; p < 4; ++p) {
    Complex<V> y[8];
    SE_UNROLL
    for (int b = 0; b < 8; ++b) y[b] = x[8 * p + b];
    dft8(y);
    SE_UNROLL
    for (int q = 0; q < 8; ++q) write(p + 4 * q, y[q]);
  }
}

// The real transform from the half-length complex one. z[n] = x[2n] + i x[2n + 1] has the transform Z of length
// M = kFftSize / 2, and X[k] = E + W O, X[M - k] = conj(E - W O), with 2 E = Z[k] + conj Z[M - k],
// 2 i O = Z[k] - conj Z[M - k], W = exp(-2 pi i k / kFftSize). The factors 1/2 are in the window. Writes |X[k]|^2 and
// |X[M - k]|^2; for k = 0 pass Z[0] twice, which gives bins 0 and M.
template <class V>
SE_HD void split_power(Complex<V> z, Complex<V> z_mirror, float w_re, float w_im, V& power, V& power_mirror) {
  const Complex<V> even = {z.re + z_mirror.re, z.im - z_mirror.im};
  const Complex<V> odd = {z.im + z_mirror.im, z_mirror.re - z.re};
  const Complex<V> turned = times(odd, w_re, w_im);
  const Complex<V> x = even + turned, x_mirror = even - turned;
  power = x.re * x.re + x.im * x.im;
  power_mirror = x_mirror.re * x_mirror.re + x_mirror.im * x_mirror.im;
}

}  // namespace singerembed
