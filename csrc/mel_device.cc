#include "mel_device.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "mel_kernels.h"

namespace singerembed {
namespace {

constexpr std::uint64_t kPairAlignment = 8;  // bytes of two floats

template <class T>
T* pointer(std::uint64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

int blocks_per_crop(const MelOptions& options) { return (options.n_frames() + kFramesPerBlock - 1) / kFramesPerBlock; }

void check_batch(int crops) {
  if (crops < 1 || crops > DeviceMel::kMaxBatch) {
    throw std::invalid_argument("a batch has 1 to " + std::to_string(DeviceMel::kMaxBatch) + " crops, not " +
                                std::to_string(crops));
  }
}

}  // namespace

SlicedBasis slice_basis(const MelTables& tables) {
  constexpr int kWidth = kWarp;
  const int n_bands = static_cast<int>(tables.bands.size());
  SlicedBasis basis;
  for (int first = 0; first < n_bands; first += kWidth) {
    const int end = std::min(first + kWidth, n_bands);
    MelSlice slice{static_cast<int>(basis.weights.size()), 0};
    for (int band = first; band < end; ++band) slice.n_bins = std::max(slice.n_bins, tables.bands[band].n_bins);
    basis.slices.push_back(slice);
    basis.weights.resize(basis.weights.size() + static_cast<std::size_t>(kWidth) * slice.n_bins, 0.0f);
    for (int lane = 0; lane < kWidth; ++lane) {
      if (first + lane >= end) {
        basis.first_bins.push_back(0);
        continue;
      }
      const MelBand& band = tables.bands[first + lane];
      const int first_bin = std::min(band.first_bin, kBins - slice.n_bins);
      basis.first_bins.push_back(first_bin);
      for (int i = 0; i < band.n_bins; ++i) {
        const int row = band.first_bin - first_bin + i;
        basis.weights[slice.first_weight + kWidth * row + lane] = tables.weights[band.first_weight + i];
      }
    }
  }
  return basis;
}

DeviceMel::DeviceMel(const MelOptions& options) : options_(options) {
  if (options.crop_samples % 2 != 0) {
    throw std::invalid_argument("on a GPU crop_samples must be even, because samples are read in pairs; it is " +
                                std::to_string(options.crop_samples));
  }
}

std::size_t DeviceMel::scratch_bytes(int crops) const {
  const std::size_t floats = options_.mel_size() + static_cast<std::size_t>(blocks_per_crop(options_));
  return sizeof(float) * static_cast<std::size_t>(crops) * floats;
}

void DeviceMel::level(std::uint64_t pcm, bool is_int16, int crops, std::uint64_t levels, std::uint64_t stream) {
  check_batch(crops);
  if (pcm % kPairAlignment != 0) throw std::invalid_argument("the address of the crops is not a multiple of 8");
  launch(LevelJob{options_.crop_samples, options_.silence_peak, pointer<const void>(pcm), pointer<DeviceLevel>(levels)},
         is_int16, crops, stream);
}

void DeviceMel::mel(std::uint64_t list, int crops, std::uint64_t scratch, std::uint64_t out, DeviceOutput type,
                    MelOutput what, std::uint64_t stream) {
  check_batch(crops);
  const int blocks = blocks_per_crop(options_);
  MelJob job{};
  job.crop_samples = options_.crop_samples;
  job.n_mels = options_.n_mels;
  job.n_frames = options_.n_frames();
  job.log_offset = options_.log_offset;
  job.power_only = what == MelOutput::kPower;
  job.crops = pointer<const DeviceCrop>(list);
  job.mel = pointer<float>(scratch);
  job.maxima = job.mel + static_cast<std::size_t>(crops) * options_.mel_size();
  launch(job, blocks, crops, stream);
  const int size = static_cast<int>(options_.mel_size());
  launch(NormaliseJob{size, blocks, options_.log_divisor, job.power_only, job.mel, job.maxima, pointer<void>(out)}, type,
         crops, stream);
}

}  // namespace singerembed
