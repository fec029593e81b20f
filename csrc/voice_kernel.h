// The kernel `voice` of mel_device.h, in stages as those of mel_kernels.h.
#pragma once

#include "mel_device.h"
#include "mel_math.h"

namespace singerembed {

constexpr int kVoiceThreads = 256;
constexpr int kVoiceSharedBytes = 3 * kVoiceThreads * 4;  // energies of the first channel, of the last, of their mean
constexpr float kCancelledShare = 0.01f;                  // as in mix_down

// Mixes segment `block` of a crop down to mono as mix_down does, and writes its energy in all channels.
template <class Exec>
SE_HD void voice_block(const VoiceJob& job, int block, const Exec& exec) {
  const int begin = block * job.segment, stop = smaller(begin + job.segment, job.samples);
  const float* first = job.voice + job.first;
  const float* last = first + static_cast<std::size_t>(job.channels - 1) * static_cast<std::size_t>(job.stride);
  exec.stage("energies", [&](int thread, auto shared) {
    float of_first = 0, of_last = 0, of_mean = 0;
    for (int i = begin + thread; i < stop; i += kVoiceThreads) {
      const float a = first[i], b = last[i], mean = 0.5f * (a + b);
      of_first += a * a;
      of_last += b * b;
      of_mean += mean * mean;
    }
    shared.store(thread, of_first);
    shared.store(kVoiceThreads + thread, of_last);
    shared.store(2 * kVoiceThreads + thread, of_mean);
  });
  for (int width = kVoiceThreads / 2; width >= 1; width /= 2) {
    exec.stage("reduce", [&](int thread, auto shared) {
      if (thread >= width) return;
      SE_UNROLL
      for (int i = thread; i < 3 * kVoiceThreads; i += kVoiceThreads) {
        shared.store(i, shared.template load<float>(i) + shared.template load<float>(i + width));
      }
    });
  }
  exec.stage("mix", [&](int thread, auto shared) {
    const float of_first = shared.template load<float>(0), of_last = shared.template load<float>(kVoiceThreads);
    const float of_mean = shared.template load<float>(2 * kVoiceThreads);
    const float second = of_first < of_last ? of_first : of_last;
    // A quarter: the energy of the mean of the second loudest channel alone.
    const bool cancelled = job.channels > 1 && of_mean < kCancelledShare * (second / 4);
    const float* louder = of_last > of_first ? last : first;
    for (int i = begin + thread; i < smaller(begin + job.segment, job.crop_samples); i += kVoiceThreads) {
      job.mono[i] = i >= stop ? 0.0f : cancelled ? louder[i] : 0.5f * (first[i] + last[i]);
    }
    if (thread == 0) job.energies[block] = job.channels > 1 ? of_first + of_last : of_first;
  });
}

}  // namespace singerembed
