// The kernels `level` and `mel` of mel_device.h as stages. `exec.stage(f)` runs f(thread, shared) for all threads of
// the block, followed by a barrier: on a GPU each thread runs its own f and then __syncthreads(), on the host a loop
// runs them all. Threads may exchange values through shared memory only between stages. After `exec.warp_stage(f)` the
// barrier is the warp's, and only its own threads may. `exec.shuffle` lets each thread take a value of a thread of its
// warp, `exec.registers` keeps values of each thread from stage to stage, and `exec.for_warp` repeats stages as often
// as each warp wants.
#pragma once

#include <cfloat>
#include <cstdint>

#include "mel_device.h"
#include "mel_math.h"
#include "mel_transform.h"

namespace singerembed {

constexpr int kFramesPerBlock = 4;  // a frame to each warp
constexpr int kMelThreads = kFramesPerBlock * kWarp;
// Stride of rows in the exchange between the passes, in words: lanes that each read four points of their row take all
// banks. The powers of the bins replace them, bin k at word k.
constexpr int kRowStride = kWarp + 4;
constexpr int kFrameWords = kWarp * kRowStride;
constexpr int kMelSharedBytes = kFramesPerBlock * kFrameWords * 4;
static_assert(kBins <= kFrameWords);

constexpr int kBinsPerStep = 4;  // of the loop over a segment of mel bands

constexpr int kLevelThreads = 512;
constexpr int kPeaksWord = 2 * kLevelThreads;  // after as many doubles
constexpr int kLevelSharedBytes = 3 * kLevelThreads * 4;

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

// On a GPU with the error of the hardware's logarithm to base 2: 2^-22, relative, and absolute between 1/2 and 2.
SE_HD float natural_logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return __logf(x);
#else
  return std::log(x);
#endif
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

// Whether the square of a crop's scale may be a factor of the mel power, in the place of one of the samples: as long as
// no square leaves the range of float.
SE_HD bool scaled_last(float scale) { return scale >= 0x1p-40f && scale <= 0x1p40f; }

// A column of a frame whose first point has sample `first`, point n1 at reversed(n1).
template <class Sample>
SE_HD void load_column(const DeviceCrop& crop, int first, Points& x) {
  const Sample* samples = reinterpret_cast<const Sample*>(static_cast<std::uintptr_t>(crop.pcm)) + first;
  SE_UNROLL
  for (int n1 = 0; n1 < kWarp; ++n1) {
    const Pair<Sample> pair = load_pair(samples + 2 * kWarp * n1);
    x.re[reversed(n1)] = static_cast<float>(pair.first);
    x.im[reversed(n1)] = static_cast<float>(pair.second);
  }
}

// The same for a frame that reaches over an end of the crop, where samples are reflected, and for any scale. By way of
// the lane's own words of shared memory, from `word` on with a stride of a warp, because registers have no index that
// varies: without a loop this rare path would be as long as the transform.
template <class Shared>
SE_HD void load_any_column(const MelJob& job, const DeviceCrop& crop, int first, int word, const Shared& shared,
                           Points& x) {
  const void* pcm = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(crop.pcm));
  const float scale = scaled_last(crop.scale) ? 1.0f : crop.scale;
  const auto load = [&](int from, float(&values)[kWarp]) {
    SE_NO_UNROLL
    for (int n1 = 0; n1 < kWarp; ++n1) {
      const int at = reflect(from + 2 * kWarp * n1, job.crop_samples);
      const float sample = crop.is_int16 ? static_cast<float>(static_cast<const std::int16_t*>(pcm)[at])
                                         : static_cast<const float*>(pcm)[at];
      shared.store(word + kWarp * n1, scale * sample);
    }
    SE_UNROLL
    for (int n1 = 0; n1 < kWarp; ++n1) values[reversed(n1)] = shared.template load<float>(word + kWarp * n1);
  };
  load(first, x.re);
  load(first + 1, x.im);
}

template <class Shared>
SE_HD void load_column(const MelJob& job, const DeviceCrop& crop, int frame, int thread, const Shared& shared,
                       Points& x) {
  const int lane = thread % kWarp, start = frame * kHopSamples - kFftSize / 2, first = start + 2 * lane;
  if (start < 0 || start + kFftSize > job.crop_samples || !scaled_last(crop.scale)) {
    load_any_column(job, crop, first, thread / kWarp * kFrameWords + lane, shared, x);
  } else if (crop.is_int16) {
    load_column<std::int16_t>(crop, first, x);
  } else {
    load_column<float>(crop, first, x);
  }
}

struct MelLane {  // registers of a lane
  Points points;
  Complex<float> mirrors[kWarp / 2];
  float rising[kFramesPerBlock], falling[kFramesPerBlock];  // sums over a segment of mel bands
  float maximum;
};

// Gives each lane its row of what the lanes have by columns: value n of lane L was value L of lane n. In bit-reversed
// order. `values` picks them from a MelLane.
template <class Exec, class Lanes, class Values>
SE_HD void exchange(const Exec& exec, Lanes& lanes, const Values& values) {
  exec.warp_stage("columns", [&](int thread, auto shared) {
    const float(&mine)[kWarp] = values(lanes[thread]);
    SE_UNROLL
    for (int row = 0; row < kWarp; ++row) {
      shared.store(thread / kWarp * kFrameWords + row * kRowStride + thread % kWarp, mine[row]);
    }
  });
  exec.warp_stage("rows", [&](int thread, auto shared) {
    float(&mine)[kWarp] = values(lanes[thread]);
    const int row = (thread / kWarp * kFrameWords + thread % kWarp * kRowStride) / 4;
    SE_UNROLL
    for (int n = 0; n < kWarp; n += 4) {
      const Quad four = shared.template load<Quad>(row + n / 4);
      mine[reversed(n)] = four.a;
      mine[reversed(n + 1)] = four.b;
      mine[reversed(n + 2)] = four.c;
      mine[reversed(n + 3)] = four.d;
    }
  });
}

// Gives each lane the mirrors kPoints - k of its bins k = lane + 32 k2 below kPoints / 2. They are in lane 32 - lane,
// from the last on; those of lane 0 its own, one further on, where bin 0 is its own mirror.
template <class Exec, class Lanes>
SE_HD void take_mirrors(const Exec& exec, Lanes& lanes) {
  const auto source = [](int thread) { return (kWarp - thread % kWarp) % kWarp; };
  SE_UNROLL
  for (int k2 = 0; k2 < kWarp / 2; ++k2) {
    const int own = (kWarp - k2) % kWarp, other = kWarp - 1 - k2;
    const auto mirror = [&](int thread, const float(&values)[kWarp]) {
      return thread % kWarp == 0 ? values[own] : values[other];
    };
    exec.shuffle(source, [&](int thread) { return mirror(thread, lanes[thread].points.re); },
                 [&](int thread, float value) { lanes[thread].mirrors[k2].re = value; });
    exec.shuffle(source, [&](int thread) { return mirror(thread, lanes[thread].points.im); },
                 [&](int thread, float value) { lanes[thread].mirrors[k2].im = value; });
  }
}

// Powers of a lane's bins and their mirrors, to the words from `base` on.
template <class Shared>
SE_HD void store_powers(const MelJob& job, int lane, int base, const MelLane& mine, const Shared& shared) {
  const Points& x = mine.points;
  SE_UNROLL
  for (int pair = 0; pair < kWarp / 4; ++pair) {
    const Quad turns = load_quad(job.tables.transform + kWarp * (kSplitQuad + pair) + lane);
    SE_UNROLL
    for (int k2 = 2 * pair; k2 < 2 * pair + 2; ++k2) {
      const Turn turn = k2 % 2 == 0 ? Turn{turns.a, turns.b} : Turn{turns.c, turns.d};
      float power, mirror_power;
      split_powers({x.re[k2], x.im[k2]}, mine.mirrors[k2], turn, power, mirror_power);
      shared.store(base + lane + kWarp * k2, power);
      shared.store(base + kPoints - lane - kWarp * k2, mirror_power);
    }
  }
  constexpr int middle = kWarp / 2;  // its bin is its own mirror, and W = -i
  if (lane == 0) shared.store(base + kPoints / 2, 4 * (x.re[middle] * x.re[middle] + x.im[middle] * x.im[middle]));
}

// Sums over a lane's segment of a slice for the bands that rise and fall over it, for all frames of the block.
template <class Shared>
SE_HD void sum_segment(const MelJob& job, int index, int lane, const Shared& shared, MelLane& mine) {
  const MelSlice slice = job.tables.slices[index];
  const Quad* weights = job.tables.weights + slice.first_weight + lane;
  int word = job.tables.first_bins[index * kWarp + lane];
  SE_UNROLL
  for (int frame = 0; frame < kFramesPerBlock; ++frame) mine.rising[frame] = mine.falling[frame] = 0;
  SE_NO_UNROLL
  for (int bin = 0; bin < slice.n_bins; bin += kBinsPerStep) {
    SE_UNROLL
    for (int i = 0; i < kBinsPerStep; i += 2) {
      const Quad weight = load_quad(weights + kWarp * i / 2);
      SE_UNROLL
      for (int frame = 0; frame < kFramesPerBlock; ++frame) {
        const int at = word + frame * kFrameWords + i;
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

// Writes a lane's band of a slice for all frames of the block, and keeps the maximum of what it has written. `factor`
// is that of the powers.
SE_HD void write_band(const MelJob& job, int index, int lane, int crop, int first_frame, float factor, MelLane& mine) {
  const MelSlice slice = job.tables.slices[index];
  float* out = job.mel + (static_cast<std::size_t>(crop) * job.n_frames + first_frame) * job.n_mels +
               slice.first_band + lane;
  SE_UNROLL
  for (int frame = 0; frame < kFramesPerBlock; ++frame) {
    const float sum = mine.rising[frame] * factor, logarithm = natural_logarithm(sum + job.log_offset);
    const float value = job.power_only ? sum : logarithm;
    if (lane < slice.n_bands && first_frame + frame < job.n_frames) {
      out[frame * job.n_mels] = value;
      mine.maximum = larger(mine.maximum, value);
    }
  }
}

// Frames [kFramesPerBlock * block, ...) of listed crop `crop`, which has `blocks` blocks. Frames beyond the last one
// are computed as the last one, and not written.
template <class Exec>
SE_HD void mel_block(const MelJob& job, int block, int blocks, int crop, const Exec& exec) {
  const int first_frame = block * kFramesPerBlock;
  auto lanes = exec.template registers<MelLane>();
  exec.warp_stage("samples", [&](int thread, auto shared) {
    const int frame = smaller(first_frame + thread / kWarp, job.n_frames - 1);
    load_column(job, job.crops[crop], frame, thread, shared, lanes[thread].points);
    transform_column(job.tables.transform + thread % kWarp, lanes[thread].points);
  });
  exchange(exec, lanes, [](MelLane& lane) -> float(&)[kWarp] { return lane.points.re; });
  exchange(exec, lanes, [](MelLane& lane) -> float(&)[kWarp] { return lane.points.im; });
  exec.warp_stage("transform", [&](int thread, auto) {
    transform_row(job.tables.transform + thread % kWarp, lanes[thread].points);
  });
  take_mirrors(exec, lanes);
  exec.stage("split", [&](int thread, auto shared) {
    store_powers(job, thread % kWarp, thread / kWarp * kFrameWords, lanes[thread], shared);
    lanes[thread].maximum = -FLT_MAX;
  });
  const float scale = job.crops[crop].scale;
  // The window and the split leave the powers 16 times as large.
  const float factor = (scaled_last(scale) ? scale * scale : 1.0f) / 16;
  const int* first_slices = job.tables.first_slices;
  const auto first_slice = [&](int warp) { return first_slices[warp]; };
  const auto end_slice = [&](int warp) { return first_slices[warp + 1]; };
  exec.for_warp(first_slice, end_slice, [&](int slice) {
    exec.warp_stage("bands", [&](int thread, auto shared) {
      sum_segment(job, slice, thread % kWarp, shared, lanes[thread]);
    });
    SE_UNROLL
    for (int frame = 0; frame < kFramesPerBlock; ++frame) {
      exec.shuffle([](int thread) { return (thread + 1) % kWarp; },
                   [&](int thread) { return lanes[thread].falling[frame]; },
                   [&](int thread, float falling) { lanes[thread].rising[frame] += falling; });
    }
    exec.warp_stage("write", [&](int thread, auto) {
      write_band(job, slice, thread % kWarp, crop, first_frame, factor, lanes[thread]);
    });
  });
  SE_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    exec.shuffle([&](int thread) { return thread % kWarp ^ distance; },
                 [&](int thread) { return lanes[thread].maximum; },
                 [&](int thread, float other) { lanes[thread].maximum = larger(lanes[thread].maximum, other); });
  }
  exec.warp_stage("maximum", [&](int thread, auto) {
    if (thread % kWarp != 0) return;
    const std::size_t warp = (static_cast<std::size_t>(crop) * blocks + block) * kFramesPerBlock + thread / kWarp;
    job.maxima[warp] = lanes[thread].maximum;
  });
}

}  // namespace singerembed
