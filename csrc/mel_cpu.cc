#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "aligned.h"
#include "isa.h"
#include "mel.h"
#include "mel_isa.h"
#include "mel_math.h"

namespace singerembed {
namespace {

// One buffer per thread, reused: a crop takes half a millisecond, and page faults would add a tenth.
float* thread_scratch(std::size_t floats) {
  thread_local AlignedFloats buffer;
  thread_local std::size_t size = 0;
  if (size < floats) {
    buffer = allocate_floats(floats);
    size = floats;
  }
  return buffer.get();
}

std::vector<const IsaKernels*> all_supported() {  // narrowest first
#ifdef SE_X86
  return supported_kernels({&kPortableKernels, &kAvx2Kernels, &kAvx512Kernels});
#else
  return supported_kernels({&kPortableKernels});
#endif
}

const IsaKernels* widest_kernels() {
  static const IsaKernels* const widest = all_supported().back();
  return widest;
}

}  // namespace

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const IsaKernels* kernels : all_supported()) names.push_back(kernels->name);
  return names;
}

MelPlan::MelPlan(const MelOptions& options, const char* isa)
    : options_(options), tables_(make_tables(options)), kernels_(find_kernels(all_supported(), isa)) {}

const char* MelPlan::isa() const { return kernels_->name; }

template <class Sample>
CropLevel MelPlan::run_any(const Sample* pcm, MelOutput output, float* mel) const {
  constexpr bool is_int16 = std::is_same_v<Sample, std::int16_t>;
  constexpr float full_scale = is_int16 ? 32768.0f : 1.0f;
  CropSums sums;
  if constexpr (is_int16) {
    sums = kernels_->sums_int16(pcm, options_.crop_samples);
  } else {
    sums = kernels_->sums_float(pcm, options_.crop_samples);
  }
  const CropLevel level = crop_level(sums.peak, sums.sum_squares, sums.finite, full_scale, options_.crop_samples,
                                     options_.silence_peak);
  if (level.state != CropState::kLoud) return level;

  CropJob job{};
  job.crop_samples = options_.crop_samples;
  job.n_mels = options_.n_mels;
  job.n_frames = options_.n_frames();
  job.log_offset = options_.log_offset;
  job.log_divisor = options_.log_divisor;
  job.scale = 1.0f / sums.peak;
  job.power_only = output == MelOutput::kPower;
  job.window = tables_.window.data();
  job.fft_twiddles = tables_.fft_twiddles.data();
  job.split_twiddles = tables_.split_twiddles.data();
  job.bands = tables_.bands.data();
  job.weights = tables_.weights.data();
  job.scratch = thread_scratch(kernels_->scratch_floats);
  job.mel = mel;
  if constexpr (is_int16) {
    kernels_->mel_int16(job, pcm);
  } else {
    kernels_->mel_float(job, pcm);
  }
  return level;
}

CropLevel MelPlan::run(const std::int16_t* pcm, MelOutput output, float* mel) const {
  return run_any(pcm, output, mel);
}

CropLevel MelPlan::run(const float* pcm, MelOutput output, float* mel) const { return run_any(pcm, output, mel); }

namespace {

constexpr int kLanes = 16;  // independent sums, which the compiler keeps in vector registers
constexpr float kCancelled = 0.01f;

// Energy of each of `channels` interleaved channels, added to `energy`.
void add_energy(const float* interleaved, std::size_t frames, std::size_t channels, float* energy) {
  const std::size_t n = frames * channels;
  std::size_t i = 0;
  if (kLanes % channels == 0) {
    float lanes[kLanes] = {};
    for (; i + kLanes <= n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += interleaved[i + j] * interleaved[i + j];
    }
    for (std::size_t j = 0; j < kLanes; ++j) energy[j % channels] += lanes[j];
  }
  for (; i < n; ++i) energy[i % channels] += interleaved[i] * interleaved[i];
}

// The index of the loudest channel if the channels cancel in their mean `mono`, else -1. With NaN they do not cancel.
int louder_channel(const float* interleaved, std::size_t frames, std::size_t channels, const float* mono) {
  std::vector<float> energy(channels + 1);
  add_energy(interleaved, frames, channels, energy.data());
  add_energy(mono, frames, 1, &energy[channels]);
  const auto last = energy.begin() + static_cast<std::ptrdiff_t>(channels);
  const auto loudest = std::max_element(energy.begin(), last);
  float second = 0;
  for (auto it = energy.begin(); it != last; ++it) {
    if (it != loudest) second = std::max(second, *it);
  }
  const float alone = second / static_cast<float>(channels * channels);  // energy of the mean of that channel alone
  return energy[channels] < kCancelled * alone ? static_cast<int>(loudest - energy.begin()) : -1;
}

}  // namespace

std::size_t mix_down(const float* interleaved, std::size_t frames, int channels, std::size_t segment, float* mono) {
  const auto n_channels = static_cast<std::size_t>(channels);
  std::size_t cancelled = 0;
  for (std::size_t start = 0; start < frames; start += segment) {
    const std::size_t n = std::min(segment, frames - start);
    const float* in = interleaved + start * n_channels;
    widest_kernels()->mix_down(in, n, channels, mono + start);
    const int louder = channels > 1 ? louder_channel(in, n, n_channels, mono + start) : -1;
    if (louder < 0) continue;
    ++cancelled;
    for (std::size_t i = 0; i < n; ++i) mono[start + i] = in[i * n_channels + static_cast<std::size_t>(louder)];
  }
  return cancelled;
}

}  // namespace singerembed
