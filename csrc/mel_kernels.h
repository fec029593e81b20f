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
#include "mel_transform.h"

namespace singerembed {

#ifndef SE_FRAMES
#define SE_FRAMES 1
#define SE_WARPS 4
#endif
constexpr int kFramesPerWarp = SE_FRAMES;
constexpr int kWarpsPerBlock = SE_WARPS;
constexpr int kMelThreads = kWarpsPerBlock * kWarp;
constexpr int kFramesPerBlock = kFramesPerWarp * kWarpsPerBlock;

#ifdef SE_COOP
constexpr int kBandFrames = kFramesPerBlock;
#else
constexpr int kBandFrames = kFramesPerWarp;
#endif

// Words of a warp's shared memory: the exchange between the passes; in its place the points whose mirrors other lanes
// need, with a stride that is odd, and the powers of the warp's last frame; behind it the powers of those before.
constexpr int kMirrorStride = kWarp / 2 + 1;  // points
constexpr int kPowerWord = 2 * kWarp * kMirrorStride + 4;
constexpr int kPowerWords = kPoints + 4;
#ifdef SE_HALVES
constexpr int kHalfStride = kWarp + 4;
constexpr int kWarpWords = kWarp * kHalfStride + (kFramesPerWarp - 1) * kPowerWords;
#else
constexpr int kWarpWords = kExchangeWords + (kFramesPerWarp - 1) * kPowerWords;
#endif
constexpr int kMelSharedBytes = kWarpsPerBlock * kWarpWords * 4;
static_assert(kPowerWord + kPowerWords <= kExchangeWords && kWarpWords % 4 == 0);

// The loop over the bins of a segment is unrolled by so many.
constexpr int kBinsPerStep = 4;

constexpr int kLevelThreads = 512;
constexpr int kPeaksWord = 2 * kLevelThreads;  // after as many doubles
constexpr int kLevelSharedBytes = 3 * kLevelThreads * 4;

constexpr int kNormaliseThreads = 256;
constexpr int kTileBands = kWarp, kTileFrames = 4 * kWarp;
constexpr int kTileStride = kTileBands + 1;
constexpr int kNormaliseSharedBytes = kTileFrames * kTileStride * 4;

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
#else
template <class Sample>
SE_HD Pair<Sample> load_pair(const Sample* p) {
  return *reinterpret_cast<const Pair<Sample>*>(p);
}
#endif

SE_HD int smaller(int a, int b) { return a < b ? a : b; }

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

// Samples are multiplied by their crop's scale where that costs nothing: its square is a factor of the mel power. Unless
// squares could leave the range of float.
SE_HD bool scaled_last(float scale) { return scale >= 0x1p-40f && scale <= 0x1p40f; }

// Samples of a frame's column as points, n1 at points[reversed(n1)].
template <class Sample>
SE_HD void load_column(const Sample* pcm, int first, Point (&points)[kWarp]) {
  SE_UNROLL
  for (int n1 = 0; n1 < kColumnPoints; ++n1) {
#ifdef SE_ABLATE_SAMPLES
    const Pair<Sample> pair = load_pair(pcm + first + 2 * kWarp * (n1 % 4));
#else
    const Pair<Sample> pair = load_pair(pcm + first + 2 * kWarp * n1);
#endif
    points[reversed(n1)] = {static_cast<float>(pair.first), static_cast<float>(pair.second)};
  }
}

// The same for a frame that reaches over an end of the crop, where samples are reflected, and for any scale.
SE_HD void load_column_at_end(const MelJob& job, const DeviceCrop& crop, int first, Point (&points)[kWarp]) {
  const void* pcm = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(crop.pcm));
  const float scale = scaled_last(crop.scale) ? 1.0f : crop.scale;
  const auto sample = [&](int i) {
    const int at = reflect(i, job.crop_samples);
    return scale * (crop.is_int16 ? static_cast<float>(static_cast<const std::int16_t*>(pcm)[at])
                                  : static_cast<const float*>(pcm)[at]);
  };
  SE_UNROLL
  for (int n1 = 0; n1 < kColumnPoints; ++n1) {
    const int i = first + 2 * kWarp * n1;
    points[reversed(n1)] = {sample(i), sample(i + 1)};
  }
}

SE_HD void load_column(const MelJob& job, const DeviceCrop& crop, int frame, int lane, Point (&points)[kWarp]) {
  const int start = frame * kHopSamples - kFftSize / 2, first = start + 2 * lane;
  if (start >= 0 && start + kFftSize <= job.crop_samples && scaled_last(crop.scale)) {
    const auto address = static_cast<std::uintptr_t>(crop.pcm);
    if (crop.is_int16) {
      load_column(reinterpret_cast<const std::int16_t*>(address), first, points);
    } else {
      load_column(reinterpret_cast<const float*>(address), first, points);
    }
  } else {
    load_column_at_end(job, crop, first, points);
  }
}

// Registers of a lane of the mel kernel.
struct MelLane {
  Point points[kWarp];
#ifdef SE_HALVES
  float real[kWarp];
#endif
#ifdef SE_SHUFFLE
  Point mirrors[kWarp / 2];
#endif
  float rising[kBandFrames], falling[kBandFrames];  // sums over a segment of mel bands
  float maximum;
};

// Where a frame's power of bin 0 is, relative to the words of its warp.
SE_HD constexpr int power_word(int frame_of_warp) {
#ifdef SE_HALVES
  return frame_of_warp == kFramesPerWarp - 1 ? 0 : kWarp * kHalfStride + frame_of_warp * kPowerWords;
#endif
  return frame_of_warp == kFramesPerWarp - 1 ? kPowerWord : kExchangeWords + frame_of_warp * kPowerWords;
}

// The transform of frame `frame` of crop `crop`: powers of its bins to shared memory, each bin at word `powers` + bin.
template <class Exec, class Lanes>
SE_HD void transform_frame(const MelJob& job, const DeviceCrop& crop, int block_frame, int index, const Exec& exec, Lanes& lanes) {
  exec.warp_stage("columns", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    const int mine = block_frame + thread / kWarp * kFramesPerWarp + index;
    Point(&points)[kWarp] = lanes[thread].points;
    load_column(job, crop, mine < job.n_frames ? mine : job.n_frames - 1, lane, points);
    transform_column(job.tables.window, lane, points);
#ifdef SE_HALVES
    SE_UNROLL
    for (int k1 = 0; k1 < kWarp; ++k1) shared.store(base + k1 * kHalfStride + lane, points[k1].re);
  });
  exec.warp_stage("rows", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    Point(&points)[kWarp] = lanes[thread].points;
    // The points still have their order by k1 in .im.
    SE_UNROLL
    for (int n2 = 0; n2 < kWarp; n2 += 4) {
      const Quad four = shared.template load<Quad>(base / 4 + lane * (kHalfStride / 4) + n2 / 4);
      lanes[thread].real[reversed(n2)] = four.a;
      lanes[thread].real[reversed(n2 + 1)] = four.b;
      lanes[thread].real[reversed(n2 + 2)] = four.c;
      lanes[thread].real[reversed(n2 + 3)] = four.d;
    }
    (void)points;
  });
  exec.warp_stage("columns", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    Point(&points)[kWarp] = lanes[thread].points;
    SE_UNROLL
    for (int k1 = 0; k1 < kWarp; ++k1) shared.store(base + k1 * kHalfStride + lane, points[k1].im);
  });
  exec.warp_stage("rows", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    Point(&points)[kWarp] = lanes[thread].points;
    SE_UNROLL
    for (int n2 = 0; n2 < kWarp; n2 += 4) {
      const Quad four = shared.template load<Quad>(base / 4 + lane * (kHalfStride / 4) + n2 / 4);
      points[reversed(n2)].im = four.a;
      points[reversed(n2 + 1)].im = four.b;
      points[reversed(n2 + 2)].im = four.c;
      points[reversed(n2 + 3)].im = four.d;
    }
    SE_UNROLL
    for (int n2 = 0; n2 < kWarp; ++n2) points[n2].re = lanes[thread].real[n2];
#else
    SE_UNROLL
    for (int k1 = 0; k1 < kWarp; ++k1) shared.store(base / 2 + k1 * kRowStride + lane, points[k1]);
  });
  exec.warp_stage("rows", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    Point(&points)[kWarp] = lanes[thread].points;
    SE_UNROLL
    for (int n2 = 0; n2 < kWarp; n2 += 2) {
      const Quad two = shared.template load<Quad>(base / 4 + lane * (kRowStride / 2) + n2 / 2);
      points[reversed(n2)] = {two.a, two.b};
      points[reversed(n2 + 1)] = {two.c, two.d};
    }
#endif
    transform_row(job.tables.row_turns, lane, points);
  });
  // Lane L has bins L + 32 k2, whose mirrors have lane 32 - L (from the last), and lane 0 its own (one further on).
#ifdef SE_SHUFFLE
  SE_UNROLL
  for (int k2 = 0; k2 < kWarp / 2; ++k2) {
    const auto source = [](int thread) { return (kWarp - thread % kWarp) % kWarp; };
    const auto of = [&](int thread) { return &lanes[thread].points[thread % kWarp == 0 ? (k2 == 0 ? 0 : kWarp - k2) : kWarp - 1 - k2]; };
    (void)of;
    exec.shuffle(source, [&](int thread) {
      const Point(&points)[kWarp] = lanes[thread].points;
      return thread % kWarp == 0 ? points[(kWarp - k2) % kWarp].re : points[kWarp - 1 - k2].re;
    }, [&](int thread, float value) { lanes[thread].mirrors[k2].re = value; });
    exec.shuffle(source, [&](int thread) {
      const Point(&points)[kWarp] = lanes[thread].points;
      return thread % kWarp == 0 ? points[(kWarp - k2) % kWarp].im : points[kWarp - 1 - k2].im;
    }, [&](int thread, float value) { lanes[thread].mirrors[k2].im = value; });
  }
#else
  exec.warp_stage("mirrors", [&](int thread, auto shared) {
    const int row = thread / kWarp * kWarpWords / 2 + thread % kWarp * kMirrorStride;
    SE_UNROLL
    for (int k2 = kWarp / 2; k2 < kWarp; ++k2) shared.store(row + k2 - kWarp / 2, lanes[thread].points[k2]);
    shared.store(row + kWarp / 2, lanes[thread].points[0]);
  });
#endif
  exec.warp_stage("split", [&](int thread, auto shared) {
    const int lane = thread % kWarp, base = thread / kWarp * kWarpWords;
    const int powers = base + power_word(index);
    const Point(&points)[kWarp] = lanes[thread].points;
    const int last = base / 2 + (lane == 0 ? kWarp / 2 : (kWarp - lane) * kMirrorStride + kWarp / 2 - 1);
    (void)last;
    SE_UNROLL
    for (int k2 = 0; k2 < kWarp / 2; k2 += 2) {
      const Quad turns = load_quad(job.tables.split_turns + kWarp * (k2 / 2) + lane);
      SE_UNROLL
      for (int j = k2; j < k2 + 2; ++j) {
        float power, mirror_power;
#ifdef SE_SHUFFLE
        const Point mirror = lanes[thread].mirrors[j];
#else
        const Point mirror = shared.template load<Point>(last - j);
#endif
        split_powers(points[j], mirror, j == k2 ? Turn{turns.a, turns.b} : Turn{turns.c, turns.d}, power, mirror_power);
        shared.store(powers + lane + kWarp * j, power);
        shared.store(powers + kPoints - lane - kWarp * j, mirror_power);
      }
    }
    if (lane == 0) shared.store(powers + kPoints / 2, 4 * squared(points[kWarp / 2]));  // its own mirror
  });
}

SE_HD int band_word(int frame) {
#ifdef SE_COOP
  return frame / kFramesPerWarp * kWarpWords + power_word(frame % kFramesPerWarp);
#else
  return power_word(frame);
#endif
}

// Sums over a lane's segment of a slice, for the bands that rise and fall over it.
template <class Shared>
SE_HD void sum_segment(const MelJob& job, int index, int thread, const Shared& shared, MelLane& mine) {
  const MelSlice slice = job.slices[index];
  const Quad* weights = job.tables.weights + slice.first_weight + thread % kWarp;
#ifdef SE_COOP
  int word = job.tables.first_bins[index * kWarp + thread % kWarp];
#else
  int word = job.tables.first_bins[index * kWarp + thread % kWarp] + thread / kWarp * kWarpWords;
#endif
  SE_UNROLL
  for (int frame = 0; frame < kBandFrames; ++frame) mine.rising[frame] = mine.falling[frame] = 0;
  SE_NO_UNROLL
  for (int bin = 0; bin < slice.n_bins; bin += kBinsPerStep) {
    SE_UNROLL
    for (int i = 0; i < kBinsPerStep; i += 2) {
      const Quad weight = load_quad(weights + kWarp * i / 2);
      SE_UNROLL
      for (int frame = 0; frame < kBandFrames; ++frame) {
        const int at = word + i + band_word(frame);
        const float first = shared.template load<float>(at), second = shared.template load<float>(at + 1);
        mine.rising[frame] += weight.a * first;
        mine.falling[frame] += weight.b * first;
        mine.rising[frame] += weight.c * second;
        mine.falling[frame] += weight.d * second;
      }
    }
    weights += kWarp * kBinsPerStep / 2;
    word += kBinsPerStep;
  }
}

// Replaces the lanes' `value` by their sum, or their maximum, in all lanes.
template <class Exec, class Lanes, class Value, class Join>
SE_HD void reduce_warp(const Exec& exec, Lanes& lanes, const Value& value, const Join& join) {
  SE_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    exec.shuffle([&](int thread) { return thread % kWarp ^ distance; },
                 [&](int thread) { return value(lanes[thread]); },
                 [&](int thread, float other) {
                   float& own = value(lanes[thread]);
                   own = join(own, other);
                 });
  }
}

// Frames [kFramesPerBlock * block, ...) of listed crop `crop`, which has `blocks` blocks. Frames beyond the last one are
// computed as the last one, and not written.
template <class Exec>
SE_HD void mel_block(const MelJob& job, int block, int blocks, int crop, const Exec& exec) {
  const int block_frame = block * kFramesPerBlock;
  const DeviceCrop description = job.crops[crop];
  const float factor = scaled_last(description.scale) ? description.scale * description.scale * 0.0625f : 0.0625f;
  auto lanes = exec.template registers<MelLane>();
#if SE_FRAMES == 1
  transform_frame(job, description, block_frame, 0, exec, lanes);
#else
  SE_NO_UNROLL
  for (int index = 0; index < kFramesPerWarp; ++index) transform_frame(job, description, block_frame, index, exec, lanes);
#endif
#ifdef SE_COOP
  exec.stage("barrier", [&](int thread, auto) { lanes[thread].maximum = -FLT_MAX; });
  const int max_slices = job.most_slices_of_a_warp;
#else
  exec.warp_stage("barrier", [&](int thread, auto) { lanes[thread].maximum = -FLT_MAX; });
  const int max_slices = job.n_slices;
#endif
  const auto index_of = [&](int thread, int i) {
#ifdef SE_COOP
    return job.first_slices[thread / kWarp] + i;
#else
    return i;
#endif
  };
  const auto end_of = [&](int thread) {
#ifdef SE_COOP
    return job.first_slices[thread / kWarp + 1];
#else
    return job.n_slices;
#endif
  };
  SE_NO_UNROLL
  for (int i = 0; i < max_slices; ++i) {
#if defined(__CUDA_ARCH__) && defined(SE_COOP)
    if (index_of(threadIdx.x, i) >= end_of(threadIdx.x)) break;
#endif
    exec.warp_stage("bands", [&](int thread, auto shared) {
      if (index_of(thread, i) >= end_of(thread)) return;
      sum_segment(job, index_of(thread, i), thread, shared, lanes[thread]);
    });
    SE_UNROLL
    for (int frame = 0; frame < kBandFrames; ++frame) {
      exec.shuffle([](int thread) { return (thread + 1) % kWarp; },
                   [&](int thread) { return lanes[thread].falling[frame]; },
                   [&](int thread, float value) { lanes[thread].rising[frame] += value; });
    }
    exec.warp_stage("write", [&](int thread, auto) {
      if (index_of(thread, i) >= end_of(thread)) return;
      MelLane& mine = lanes[thread];
      const MelSlice slice = job.slices[index_of(thread, i)];
      const int lane = thread % kWarp;
#ifdef SE_COOP
      const int first_frame = block_frame;
#else
      const int first_frame = block_frame + thread / kWarp * kFramesPerWarp;
#endif
      float* out = job.mel + (static_cast<std::size_t>(crop) * job.n_frames + first_frame) * job.n_mels + slice.first_band + lane;
      SE_UNROLL
      for (int frame = 0; frame < kBandFrames; ++frame) {
        const float sum = mine.rising[frame] * factor, logarithm = natural_logarithm(sum + job.log_offset);
        const float value = job.power_only ? sum : logarithm;
        if (lane < slice.n_bands && first_frame + frame < job.n_frames) {
          *out = value;
          mine.maximum = larger(mine.maximum, value);
        }
        out += job.n_mels;
      }
    });
  }
  reduce_warp(exec, lanes, [](MelLane& lane) -> float& { return lane.maximum; },
              [](float a, float b) { return larger(a, b); });
  exec.warp_stage("maximum", [&](int thread, auto) {
    if (thread % kWarp != 0) return;
    const std::size_t at = (static_cast<std::size_t>(crop) * blocks + block) * kWarpsPerBlock + thread / kWarp;
    job.maxima[at] = lanes[thread].maximum;
  });
}

// --- normalise ----------------------------------------------------------------------------------------------------

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
    Out* out = static_cast<Out*>(job.out) + offset + static_cast<std::size_t>(first_band) * job.n_frames + first_frame + frame;
    SE_UNROLL
    for (int i = 0; i < kTileBands; i += step) {
      const int band = i + thread / kTileFrames;
      const float value = shared.template load<float>(frame * kTileStride + band);
      if (inside && first_band + band < job.n_mels) store_value(out + band * job.n_frames, value);
    }
  });
}

}  // namespace singerembed
