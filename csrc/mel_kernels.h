// The kernels of mel_device.h as stages. `exec.stage(f)` runs f(thread, shared) for all threads of the block, followed
// by a barrier: on a GPU each thread runs its own f and then __syncthreads(), on the host a loop runs them all. Threads
// may exchange values through shared memory only between stages. After `exec.warp_stage(f)` the barrier is the warp's, and
// only its own threads may.
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
// Sums of a group of bands, one per thread: of each warp's share of the bins, for each frame.
constexpr int kSumsWord = kFramesPerBlock * kFramePoints * 2;
constexpr int kMaximaWord = kSumsWord + kMelThreads / kWarp * kFramesPerBlock * kMelThreads;
constexpr int kMelSharedBytes = (kMaximaWord + kMelThreads) * 4;

constexpr int kLevelThreads = 512;
constexpr int kPeaksWord = 2 * kLevelThreads;  // after as many doubles
constexpr int kLevelSharedBytes = 3 * kLevelThreads * 4;

constexpr int kNormaliseThreads = 256;
constexpr int kNormaliseChunk = 16 * kNormaliseThreads;  // values per block
constexpr int kNormaliseSharedBytes = kNormaliseThreads * 4;

// The loop over the bins of a slice is unrolled by kBinsPerStep in each warp, so a slice has a multiple of kSliceBins.
constexpr int kBinsPerStep = 2;
constexpr int kSliceBins = kBinsPerStep * kMelThreads / kWarp;

static_assert(kWarp == kDft32Points && kWarp * kWarp == kPoints);
static_assert(kMelSharedBytes <= 48 * 1024, "more needs an attribute of the kernel");

template <class Sample>
struct alignas(2 * sizeof(Sample)) Pair {  // a single load on a GPU
  Sample first, second;
};

// Reads memory that no kernel of the launch writes.
#if defined(__CUDA_ARCH__)
SE_HD Pair<float> load_pair(const float* p) {
  const float2 pair = __ldg(reinterpret_cast<const float2*>(p));
  return {pair.x, pair.y};
}
SE_HD Pair<std::int16_t> load_pair(const std::int16_t* p) {
  const short2 pair = __ldg(reinterpret_cast<const short2*>(p));
  return {pair.x, pair.y};
}
SE_HD WeightedWord load_weight(const WeightedWord* p) {
  const int2 pair = __ldg(reinterpret_cast<const int2*>(p));
  return {__int_as_float(pair.x), pair.y};
}
#else
template <class Sample>
SE_HD Pair<Sample> load_pair(const Sample* p) {
  return *reinterpret_cast<const Pair<Sample>*>(p);
}
SE_HD WeightedWord load_weight(const WeightedWord* p) { return *p; }
#endif

SE_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);  // one instruction
#else
  return a > b ? a : b;
#endif
}

// On a GPU with the error of the hardware's logarithm to base 2: 2^-22, relative, and absolute between 1/2 and 2.
SE_HD float natural_logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return __logf(x);
#else
  return std::log(x);
#endif
}

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

// Column `column` of a frame of `pcm`, which starts at sample `first`: window, DFT over n1, twiddle factors. `inside`: the
// frame does not reach over an end of the crop, where samples are reflected.
template <bool inside, class Sample, class Shared>
SE_HD void transform_column(const MelJob& job, const Sample* pcm, float scale, int first, int column, int base,
                            const Shared& shared) {
  // One address each, to which the unrolled reads add constants.
  const Sample* samples = pcm + (inside ? first + 2 * column : 0);
  const float* window = job.tables.window + 2 * column;
  // The table has the twiddle factor of n2 * k1 at [n2][k1]; it is symmetric, and [k1][n2] makes lanes adjacent.
  const float* twiddles = job.tables.fft_twiddles + 2 * column;
  dft32<float>(
      [&](int n1) {
        const int step = 2 * kWarp * n1, sample = first + 2 * column + step;
        Pair<Sample> pair;
        if (inside) {
          pair = load_pair(samples + step);
        } else {
          pair = {pcm[reflect(sample, job.crop_samples)], pcm[reflect(sample + 1, job.crop_samples)]};
        }
        const Pair<float> factor = load_pair(window + step);
        return Complex<float>{static_cast<float>(pair.first) * scale * factor.first,
                              static_cast<float>(pair.second) * scale * factor.second};
      },
      [&](int k1, Complex<float> value) {
        const Pair<float> turn = load_pair(twiddles + 2 * kWarp * k1);
        shared.store(base + k1 * kRowPoints + column, times(value, turn.first, turn.second));
      });
}

template <class Sample, class Shared>
SE_HD void transform_column(const MelJob& job, const DeviceCrop& crop, int frame, int column, int base,
                            const Shared& shared) {
  const Sample* pcm = reinterpret_cast<const Sample*>(static_cast<std::uintptr_t>(crop.pcm));
  const int first = frame * kHopSamples - kFftSize / 2;
  if (first >= 0 && first + kFftSize <= job.crop_samples) {
    transform_column<true>(job, pcm, crop.scale, first, column, base, shared);
  } else {
    transform_column<false>(job, pcm, crop.scale, first, column, base, shared);
  }
}

// Row `row` of a frame: DFT over n2 in place.
template <class Shared>
SE_HD void transform_row_in_place(int row, int base, const Shared& shared) {
  dft32<float>([&](int n2) { return shared.template load<Complex<float>>(base + row * kRowPoints + n2); },
               [&](int k2, Complex<float> value) { shared.store(base + row * kRowPoints + k2, value); });
}

// Bins k = lane + 32 j up to kPoints / 2, each with its mirror kPoints - k: the powers replace the points. The places of
// both are written out (point_of_bin, power_word), because their divisions would cost more than the arithmetic.
template <class Shared>
SE_HD void split_in_place(const MelJob& job, int lane, int base, const Shared& shared) {
  const int mirror_lane = lane == 0 ? 0 : kWarp - lane;
  const int row = base + lane * kRowPoints;
  const int last = base + mirror_lane * kRowPoints + (lane == 0 ? kWarp : kWarp - 1);  // the mirror of j = 0
  const float* twiddles = job.tables.split_twiddles + 2 * lane;
  const int half = lane / (kWarp / 2), mirror_half = mirror_lane / (kWarp / 2);
  const auto split = [&](int j, int mirror) {
    const auto z = shared.template load<Complex<float>>(row + j);
    const auto z_mirror = shared.template load<Complex<float>>(mirror);
    const Pair<float> turn = load_pair(twiddles + 2 * kWarp * j);
    float power, power_mirror;
    split_power(z, z_mirror, turn.first, turn.second, power, power_mirror);
    shared.store(2 * (row + j) + half, power);
    shared.store(2 * (last - j) + mirror_half, power_mirror);
  };
  split(0, lane == 0 ? row : last);  // bin 0 is its own mirror, whose power goes to the spare point of row 0
  SE_UNROLL
  for (int j = 1; j < kWarp / 2; ++j) split(j, last - j);
  if (lane == 0) split(kWarp / 2, last - kWarp / 2);
}

// Sums over a warp's share of the bins of each band of a group, which has a slice per warp, for all frames: the shares of
// the warps are equally long, and a weight is read once for all frames.
template <class Shared>
SE_HD void sum_bands(const MelJob& job, int group, int thread, const Shared& shared) {
  constexpr int warps = kMelThreads / kWarp;
  const int warp = thread / kWarp, lane = thread % kWarp;
  SE_UNROLL
  for (int i = 0; i < warps; ++i) {
    const int index = group * warps + i;
    if (index * kWarp >= job.n_mels) break;
    const MelSlice slice = job.tables.slices[index];
    const int share = slice.n_bins / warps;
    const WeightedWord* at = job.tables.weights + slice.first_weight + kWarp * share * warp + lane;
    float sums[kFramesPerBlock] = {};
    SE_NO_UNROLL
    for (const WeightedWord* end = at + kWarp * share; at != end; at += kWarp * kBinsPerStep) {
      SE_UNROLL
      for (int bin = 0; bin < kBinsPerStep; ++bin) {
        const WeightedWord weight = load_weight(at + kWarp * bin);
        SE_UNROLL
        for (int frame = 0; frame < kFramesPerBlock; ++frame) {
          sums[frame] += shared.template load<float>(2 * frame * kFramePoints + weight.word) * weight.weight;
        }
      }
    }
    SE_UNROLL
    for (int frame = 0; frame < kFramesPerBlock; ++frame) {
      shared.store(kSumsWord + (warp * kFramesPerBlock + frame) * kMelThreads + i * kWarp + lane, sums[frame]);
    }
  }
}

// Adds up the shares of one band and writes it for all frames. Returns the maximum of the written values.
template <class Shared>
SE_HD float write_band(const MelJob& job, int crop, int first_frame, int band, int thread, const Shared& shared) {
  float* out = job.mel + (static_cast<std::size_t>(crop) * job.n_mels + band) * job.n_frames + first_frame;
  float maximum = -FLT_MAX;
  SE_UNROLL
  for (int frame = 0; frame < kFramesPerBlock; ++frame) {
    if (first_frame + frame >= job.n_frames) break;
    float sum = 0;
    SE_UNROLL
    for (int warp = 0; warp < kMelThreads / kWarp; ++warp) {
      sum += shared.template load<float>(kSumsWord + (warp * kFramesPerBlock + frame) * kMelThreads + thread);
    }
    const float value = job.power_only ? sum : natural_logarithm(sum + job.log_offset);
    out[frame] = value;
    maximum = larger(value, maximum);
  }
  return maximum;
}

// Frames [kFramesPerBlock * block, ...) of listed crop `crop`, which has `blocks` blocks. Frames beyond the last one are
// computed as the last one, and not written.
template <class Exec>
SE_HD void mel_block(const MelJob& job, int block, int blocks, int crop, const Exec& exec) {
  const int first_frame = block * kFramesPerBlock;
  exec.warp_stage("columns", [&](int thread, auto shared) {
    const int mine = first_frame + thread / kWarp, base = thread / kWarp * kFramePoints;
    const int frame = mine < job.n_frames ? mine : job.n_frames - 1;
    const DeviceCrop description = job.crops[crop];
    if (description.is_int16) {
      transform_column<std::int16_t>(job, description, frame, thread % kWarp, base, shared);
    } else {
      transform_column<float>(job, description, frame, thread % kWarp, base, shared);
    }
  });
  exec.warp_stage("rows", [&](int thread, auto shared) {
    transform_row_in_place(thread % kWarp, thread / kWarp * kFramePoints, shared);
  });
  exec.stage("split", [&](int thread, auto shared) {
    split_in_place(job, thread % kWarp, thread / kWarp * kFramePoints, shared);
  });
  for (int group = 0; group * kMelThreads < job.n_mels; ++group) {
    exec.stage("bands", [&](int thread, auto shared) { sum_bands(job, group, thread, shared); });
    exec.stage("sums", [&](int thread, auto shared) {
      const int band = group * kMelThreads + thread;
      float maximum = group == 0 ? -FLT_MAX : shared.template load<float>(kMaximaWord + thread);
      if (band < job.n_mels) {
        maximum = larger(maximum, write_band(job, crop, first_frame, band, thread, shared));
      }
      shared.store(kMaximaWord + thread, maximum);
    });
  }
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
