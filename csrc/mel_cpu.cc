#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "mel.h"
#include "mel_isa.h"
#include "mel_math.h"

namespace singerembed {
namespace {

constexpr std::align_val_t kVectorAlignment{64};

struct AlignedDelete {
  void operator()(float* p) const noexcept { ::operator delete[](p, kVectorAlignment); }
};

// One buffer per thread, reused: a crop takes half a millisecond, and page faults would add a tenth.
float* thread_scratch(std::size_t floats) {
  thread_local std::unique_ptr<float[], AlignedDelete> buffer;
  thread_local std::size_t size = 0;
  if (size < floats) {
    buffer.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kVectorAlignment)));
    size = floats;
  }
  return buffer.get();
}

std::vector<const IsaKernels*> supported_kernels() {  // narrowest first
  std::vector<const IsaKernels*> kernels{&kPortableKernels};
#ifdef SE_X86
  for (const IsaKernels* wider : {&kAvx2Kernels, &kAvx512Kernels}) {
    if (wider->supported()) kernels.push_back(wider);
  }
#endif
  return kernels;
}

const IsaKernels* widest_kernels() {
  static const IsaKernels* const widest = supported_kernels().back();
  return widest;
}

const IsaKernels* find_kernels(const std::string& isa) {
  if (isa.empty()) return widest_kernels();
  std::string known;
  for (const IsaKernels* kernels : supported_kernels()) {
    if (isa == kernels->name) return kernels;
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("isa \"" + isa + "\" is not available here; there are: " + known);
}

}  // namespace

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const IsaKernels* kernels : supported_kernels()) names.push_back(kernels->name);
  return names;
}

MelPlan::MelPlan(const MelOptions& options, const char* isa)
    : options_(options), tables_(make_tables(options)), kernels_(find_kernels(isa)) {}

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

void mix_down(const float* interleaved, std::size_t frames, int channels, float* mono) {
  widest_kernels()->mix_down(interleaved, frames, channels, mono);
}

}  // namespace singerembed
