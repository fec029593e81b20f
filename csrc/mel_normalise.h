// The kernel `normalise` of mel_device.h, in stages as those of mel_kernels.h.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "mel_device.h"
#include "mel_math.h"
#include "mel_transform.h"

namespace singerembed {

constexpr int kNormaliseThreads = 256;
constexpr int kTileBands = kWarp, kTileFrames = 4 * kWarp;
constexpr int kTileStride = kTileBands + 1;
constexpr int kNormaliseSharedBytes = kTileFrames * kTileStride * 4;

// Writes the maximum of the `threads` floats from word `first` on to that word. `threads` is a power of two.
// By sixteens, because a barrier costs more than a few more loads.
template <class Exec>
SE_HD void reduce_maximum(const Exec& exec, int first, int threads) {
  for (int count = threads; count > 1;) {
    const int width = (count + 15) / 16;
    exec.stage("reduce", [&](int thread, auto shared) {
      if (thread >= width) return;
      float maximum = shared.template load<float>(first + thread);
      SE_UNROLL
      for (int i = 1; i < 16; ++i) {
        const int other = thread + i * width;
        if (other < count) maximum = larger(maximum, shared.template load<float>(first + other));
      }
      shared.store(first + thread, maximum);
    });
    count = width;
  }
}

// Bits of the nearest IEEE half, ties to even. Values beyond the range become the largest finite half, because a crop
// whose maximum is nearly 0 would give infinity, which the encoder would turn into NaN.
SE_HD std::uint16_t to_half_bits(float x) {
  constexpr float largest = 65504.0f;
  if (x > largest) x = largest;
  if (x < -largest) x = -largest;
#if defined(__CUDA_ARCH__)
  std::uint16_t nearest;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest) : "f"(x));
  return nearest;
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000u, absolute = bits & 0x7fffffffu;
  if (absolute > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);  // NaN
  std::uint32_t half;
  if (absolute < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to a multiple of 2^-24
    float shifted;
    std::memcpy(&shifted, &absolute, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (absolute + 0xfffu + (absolute >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
#endif
}

SE_HD void store_value(float* out, float value) { *out = value; }
SE_HD void store_value(std::uint16_t* out, float value) { *out = to_half_bits(value); }

// A tile of listed crop `crop`: frames [kTileFrames * part, ...) of bands [kTileBands * group, ...). Out: float, or
// std::uint16_t for the bits of a half.
template <class Out, class Exec>
SE_HD void normalise_block(const NormaliseJob& job, int part, int group, int crop, const Exec& exec) {
  const int first_frame = part * kTileFrames, first_band = group * kTileBands;
  if (job.log_divisor == 0) {
    exec.stage("maxima", [&](int thread, auto shared) {
      const float* maxima = job.maxima + static_cast<std::size_t>(crop) * job.maxima_per_crop;
      float maximum = -FLT_MAX;
      for (int i = thread; i < job.maxima_per_crop; i += kNormaliseThreads) maximum = larger(maximum, maxima[i]);
      shared.store(thread, maximum);
    });
    reduce_maximum(exec, 0, kNormaliseThreads);
  }
  auto factors = exec.template registers<float>();
  exec.stage("factor", [&](int thread, auto shared) {
    const float divisor = job.log_divisor != 0 ? job.log_divisor : shared.template load<float>(0);
    factors[thread] = job.power_only ? 1.0f : 1.0f / divisor;
  });
  const std::size_t offset = static_cast<std::size_t>(crop) * job.n_mels * job.n_frames;
  exec.stage("load", [&](int thread, auto shared) {
    // Beyond the last band or frame: the last one again, which is not written.
    const float* mel = job.mel + offset + smaller(first_band + thread % kWarp, job.n_mels - 1);
    SE_UNROLL
    for (int i = 0; i < kTileFrames; i += kNormaliseThreads / kWarp) {
      const int row = i + thread / kWarp, frame = smaller(first_frame + row, job.n_frames - 1);
      shared.store(row * kTileStride + thread % kWarp, mel[frame * job.n_mels] * factors[thread]);
    }
  });
  exec.stage("normalise", [&](int thread, auto shared) {
    constexpr int step = kNormaliseThreads / kTileFrames;
    const int frame = thread % kTileFrames;
    const bool inside = first_frame + frame < job.n_frames;
    Out* out = static_cast<Out*>(job.out) + offset + static_cast<std::size_t>(first_band) * job.n_frames +
               first_frame + frame;
    SE_UNROLL
    for (int i = 0; i < kTileBands; i += step) {
      const int band = i + thread / kTileFrames;
      const float value = shared.template load<float>(frame * kTileStride + band);
      if (inside && first_band + band < job.n_mels) store_value(out + band * job.n_frames, value);
    }
  });
}

}  // namespace singerembed
