// Interface between mel_cpu.cc and mel_lanes.inc, which is compiled once per instruction set. Plain pointers only:
// those sources must not instantiate anything from the standard library, for the reason given at SE_HD.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mel.h"

namespace singerembed {

struct CropSums {
  float peak;          // in the unit of the samples: int16, or full scale 1
  double sum_squares;  // likewise; infinite if float overflows
  bool finite;
};

struct CropJob {
  int crop_samples, n_mels, n_frames;
  float log_offset, log_divisor;
  float scale;  // factor on samples: 1 / peak
  bool power_only;
  const float* window;
  const float* fft_twiddles;
  const float* split_twiddles;
  const MelBand* bands;
  const float* weights;
  float* scratch;  // scratch_floats, aligned to 64 bytes
  float* mel;      // [n_mels, n_frames]
};

struct IsaKernels {
  const char* name;
  bool (*supported)();
  std::size_t scratch_floats;
  CropSums (*sums_int16)(const std::int16_t* pcm, int n);
  CropSums (*sums_float)(const float* pcm, int n);
  void (*mel_int16)(const CropJob& job, const std::int16_t* pcm);
  void (*mel_float)(const CropJob& job, const float* pcm);
  void (*mix_down)(const float* interleaved, std::size_t frames, int channels, float* mono);
};

extern const IsaKernels kPortableKernels;
#ifdef SE_X86
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
#endif

}  // namespace singerembed
