// The kernels of mel_device.h as stages. `exec.stage(f)` runs f(thread, shared) for all threads of the block, followed
// by a barrier: on a GPU each thread runs its own f and then __syncthreads(), on the host a loop runs them all. Threads
// may exchange values through shared memory only between stages.
//
// The FFT is that of the CPU implementation (mel_lanes.inc): 1024 complex points as 32 x 32, here with one frame per
// warp, and one column, then one row, in the registers of a lane.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "mel_device.h"
#include "mel_math.h"

namespace singerembed {

constexpr int kWarp = 32;
constexpr int kFramesPerBlock = 4;
constexpr int kMelThreads = kFramesPerBlock * kWarp;
constexpr int kPoints = kFftSize / 2;
// Stride of rows of 32 points, in points: odd, so that the points of a column are in different banks. The 33rd point of
// row 0 holds the power of bin kPoints.
constexpr int kRowPoints = kWarp + 1;
constexpr int kFramePoints = kWarp * kRowPoints;
constexpr int kMaximaWord = kFramesPerBlock * kFramePoints * 2;
constexpr int kMelSharedBytes = (kMaximaWord + kMelThreads) * 4;

constexpr int kLevelThreads = 512;
constexpr int kPeaksWord = 2 * kLevelThreads;  // after as many doubles
constexpr int kLevelSharedBytes = 3 * kLevelThreads * 4;

constexpr int kNormaliseThreads = 256;
constexpr int kNormaliseChunk = 16 * kNormaliseThreads;  // values per block
constexpr int kNormaliseSharedBytes = kNormaliseThreads * 4;

static_assert(kWarp == kDft32Points && kWarp * kWarp == kPoints);
static_assert(kMelSharedBytes <= 48 * 1024, "more needs an attribute of the kernel");

template <class Sample>
struct alignas(2 * sizeof(Sample)) Pair {  // a single load on a GPU
  Sample first, second;
};

template <class Sample>
SE_HD Pair<Sample> load_pair(const Sample* p) {
  return *reinterpret_cast<const Pair<Sample>*>(p);
}

SE_HD float larger(float a, float b) { return a > b ? a : b; }

// Writes the maximum of the `threads` floats from word `first` on to that word. `threads` is a power of two.
template <class Exec>
SE_HD void reduce_maximum(const Exec& exec, int first, int threads) {
  for (int width = threads / 2; width >= 1; width /= 2) {
    exec.stage("reduce", [&](int thread, auto shared) {
      if (thread >= width) return;
      const float other = shared.template load<float>(first + thread + width);
      shared.store(first + thread, larger(shared.template load<float>(first + thread), other));
    });
  }
}

// --- level --------------------------------------------------------------------------------------------------------

// |x|; infinity for a sample that is not finite.
SE_HD float magnitude(float x) {
  const float positive = x < 0 ? -x : x;
  return positive <= FLT_MAX ? positive : INFINITY;
}

template <class Sample, class Exec>
SE_HD void level_block(const LevelJob& job, int crop, const Exec& exec) {
  constexpr bool is_int16 = sizeof(Sample) == sizeof(std::int16_t);
  exec.stage("samples", [&](int thread, auto shared) {
    const Sample* pcm = static_cast<const Sample*>(job.pcm) + static_cast<std::size_t>(crop) * job.crop_samples;
    float peak = 0, squares = 0;
    for (int i = 2 * thread; i < job.crop_samples; i += 2 * kLevelThreads) {
      const Pair<Sample> pair = load_pair(pcm + i);
      const float a = static_cast<float>(pair.first), b = static_cast<float>(pair.second);
      peak = larger(peak, larger(magnitude(a), magnitude(b)));
      squares += a * a + b * b;
    }
    shared.store(thread, static_cast<double>(squares));
    shared.store(kPeaksWord + thread, peak);
  });
  for (int width = kLevelThreads / 2; width >= 1; width /= 2) {
    exec.stage("reduce", [&](int thread, auto shared) {
      if (thread >= width) return;
      shared.store(thread, shared.template load<double>(thread) + shared.template load<double>(thread + width));
      const float other = shared.template load<float>(kPeaksWord + thread + width);
      shared.store(kPeaksWord + thread, larger(shared.template load<float>(kPeaksWord + thread), other));
    });
  }
  exec.stage("level", [&](int thread, auto shared) {
    if (thread != 0) return;
    const float peak = shared.template load<float>(kPeaksWord);
    const CropLevel level = crop_level(peak, shared.template load<double>(0), peak <= FLT_MAX,
                                       is_int16 ? 32768.0f : 1.0f, job.crop_samples, job.silence_peak);
    const bool loud = level.state == CropState::kLoud;
    job.levels[crop] = {level.peak, level.rms, loud ? 1.0f / peak : 0.0f, static_cast<std::int32_t>(level.state)};
  });
}

// --- mel ----------------------------------------------------------------------------------------------------------

SE_HD int point_of_bin(int bin) { return (bin % kWarp) * kRowPoints + bin / kWarp; }

// The word of a bin's power: the second word of its point for rows 16 to 31, so that 32 lanes use all banks.
SE_HD int power_word(int bin) { return 2 * point_of_bin(bin) + bin % kWarp / (kWarp / 2); }

// Column `column` of a frame: window, DFT over n1, twiddle factors.
template <class Sample, class Shared>
SE_HD void transform_column(const MelJob& job, const DeviceCrop& crop, int frame, int column, int base,
                            const Shared& shared) {
  const Sample* pcm = reinterpret_cast<const Sample*>(static_cast<std::uintptr_t>(crop.pcm));
  const int first = frame * kHopSamples - kFftSize / 2;
  const bool inside = first >= 0 && first + kFftSize <= job.crop_samples;
  dft32<float>(
      [&](int n1) {
        const int sample = 2 * (kWarp * n1 + column);
        Pair<Sample> pair;
        if (inside) {
          pair = load_pair(pcm + first + sample);
        } else {
          pair = {pcm[reflect(first + sample, job.crop_samples)], pcm[reflect(first + sample + 1, job.crop_samples)]};
        }
        const Pair<float> window = load_pair(job.tables.window + sample);
        return Complex<float>{static_cast<float>(pair.first) * crop.scale * window.first,
                              static_cast<float>(pair.second) * crop.scale * window.second};
      },
      [&](int k1, Complex<float> value) {
        // The table has the twiddle factor of n2 * k1 at [n2][k1]; it is symmetric, and [k1][n2] makes lanes adjacent.
        const Pair<float> turn = load_pair(job.tables.fft_twiddles + 2 * (kWarp * k1 + column));
        shared.store(base + k1 * kRowPoints + column, times(value, turn.first, turn.second));
      });
}

// Row `row` of a frame: DFT over n2 in place.
template <class Shared>
SE_HD void transform_row_in_place(int row, int base, const Shared& shared) {
  dft32<float>([&](int n2) { return shared.template load<Complex<float>>(base + row * kRowPoints + n2); },
               [&](int k2, Complex<float> value) { shared.store(base + row * kRowPoints + k2, value); });
}

// Bins k = lane, lane + 32, ... up to kPoints / 2, each with its mirror: the powers replace the points.
template <class Shared>
SE_HD void split_in_place(const MelJob& job, int lane, int base, const Shared& shared) {
  for (int k = lane; k <= kPoints / 2; k += kWarp) {
    const auto z = shared.template load<Complex<float>>(base + point_of_bin(k));
    const auto z_mirror = shared.template load<Complex<float>>(base + point_of_bin(k == 0 ? 0 : kPoints - k));
    const Pair<float> turn = load_pair(job.tables.split_twiddles + 2 * k);
    float power, power_mirror;
    split_power(z, z_mirror, turn.first, turn.second, power, power_mirror);
    shared.store(2 * base + power_word(k), power);
    shared.store(2 * base + power_word(kPoints - k), power_mirror);  // mirror of bin 0: the spare point of row 0
  }
}

// One band of all frames of the block, reading the weights once. Returns the maximum of the written values.
template <class Shared>
SE_HD float write_band(const MelJob& job, int crop, int first_frame, int band, const Shared& shared) {
  const MelSlice slice = job.tables.slices[band / kWarp];
  const float* weights = job.tables.weights + slice.first_weight + band % kWarp;
  const int first_bin = job.tables.first_bins[band];
  float sums[kFramesPerBlock] = {};
  for (int i = 0; i < slice.n_bins; ++i) {
    const float weight = weights[kWarp * i];
    const int word = power_word(first_bin + i);
    SE_UNROLL
    for (int frame = 0; frame < kFramesPerBlock; ++frame) {
      if (first_frame + frame >= job.n_frames) continue;
      sums[frame] += shared.template load<float>(2 * frame * kFramePoints + word) * weight;
    }
  }
  float* out = job.mel + (static_cast<std::size_t>(crop) * job.n_mels + band) * job.n_frames + first_frame;
  float maximum = -FLT_MAX;
  SE_UNROLL
  for (int frame = 0; frame < kFramesPerBlock; ++frame) {
    if (first_frame + frame >= job.n_frames) continue;
    const float value = job.power_only ? sums[frame] : std::log(sums[frame] + job.log_offset);
    out[frame] = value;
    maximum = larger(value, maximum);
  }
  return maximum;
}

// Frames [kFramesPerBlock * block, ...) of listed crop `crop`, which has `blocks` blocks.
template <class Exec>
SE_HD void mel_block(const MelJob& job, int block, int blocks, int crop, const Exec& exec) {
  const int first_frame = block * kFramesPerBlock;
  exec.stage("columns", [&](int thread, auto shared) {
    const int frame = first_frame + thread / kWarp, base = thread / kWarp * kFramePoints;
    if (frame >= job.n_frames) return;
    const DeviceCrop description = job.crops[crop];
    if (description.is_int16) {
      transform_column<std::int16_t>(job, description, frame, thread % kWarp, base, shared);
    } else {
      transform_column<float>(job, description, frame, thread % kWarp, base, shared);
    }
  });
  exec.stage("rows", [&](int thread, auto shared) {
    if (first_frame + thread / kWarp >= job.n_frames) return;
    transform_row_in_place(thread % kWarp, thread / kWarp * kFramePoints, shared);
  });
  exec.stage("split", [&](int thread, auto shared) {
    if (first_frame + thread / kWarp >= job.n_frames) return;
    split_in_place(job, thread % kWarp, thread / kWarp * kFramePoints, shared);
  });
  exec.stage("bands", [&](int thread, auto shared) {
    float maximum = -FLT_MAX;
    for (int band = thread; band < job.n_mels; band += kMelThreads) {
      maximum = larger(maximum, write_band(job, crop, first_frame, band, shared));
    }
    shared.store(kMaximaWord + thread, maximum);
  });
  reduce_maximum(exec, kMaximaWord, kMelThreads);
  exec.stage("maximum", [&](int thread, auto shared) {
    if (thread == 0) {
      job.maxima[static_cast<std::size_t>(crop) * blocks + block] = shared.template load<float>(kMaximaWord);
    }
  });
}

// --- normalise ----------------------------------------------------------------------------------------------------

// Bits of the nearest IEEE half, ties to even. Values beyond the range become the largest finite half, because a crop
// whose maximum is nearly 0 would give infinity, which the encoder would turn into NaN.
SE_HD std::uint16_t to_half_bits(float x) {
  constexpr float largest = 65504.0f;
  if (x > largest) x = largest;
  if (x < -largest) x = -largest;
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
}

SE_HD void store_value(float* out, float value) { *out = value; }
SE_HD void store_value(std::uint16_t* out, float value) { *out = to_half_bits(value); }

// Values [chunk * kNormaliseChunk, ...) of listed crop `crop`. Out: float, or std::uint16_t for the bits of a half.
template <class Out, class Exec>
SE_HD void normalise_block(const NormaliseJob& job, int chunk, int crop, const Exec& exec) {
  exec.stage("maxima", [&](int thread, auto shared) {
    const float* maxima = job.maxima + static_cast<std::size_t>(crop) * job.blocks;
    float maximum = -FLT_MAX;
    for (int i = thread; i < job.blocks; i += kNormaliseThreads) maximum = larger(maximum, maxima[i]);
    shared.store(thread, maximum);
  });
  reduce_maximum(exec, 0, kNormaliseThreads);
  exec.stage("normalise", [&](int thread, auto shared) {
    const float divisor = job.log_divisor != 0 ? job.log_divisor : shared.template load<float>(0);
    const float factor = job.power_only ? 1.0f : 1.0f / divisor;
    const std::size_t offset = static_cast<std::size_t>(crop) * job.size;
    const int first = chunk * kNormaliseChunk;
    const int end = first + kNormaliseChunk < job.size ? first + kNormaliseChunk : job.size;
    for (int i = first + thread; i < end; i += kNormaliseThreads) {
      store_value(static_cast<Out*>(job.out) + offset + i, job.mel[offset + i] * factor);
    }
  });
}

}  // namespace singerembed
