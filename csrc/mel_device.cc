#include "mel_device.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

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

namespace {

// First bin of each band of a slice. A band shorter than the slice may start earlier, over zero weights. All lanes step
// through the bins together, so bands that start in different banks of shared memory stay in different banks.
std::vector<int> choose_first_bins(const MelBand* bands, int n_bands, int slice_bins) {
  std::vector<int> order(static_cast<std::size_t>(n_bands)), first_bins(kWarp, 0);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return bands[a].n_bins > bands[b].n_bins; });
  int users[kWarp] = {};  // of each bank
  for (const int lane : order) {  // those with the fewest possible starts first
    const MelBand& band = bands[lane];
    const int last = std::min(band.first_bin, kBins - slice_bins);
    const int first = std::max(0, band.first_bin + band.n_bins - slice_bins);
    int best = last;
    for (int bin = last; bin >= first; --bin) {
      if (users[power_word(bin) % kWarp] < users[power_word(best) % kWarp]) best = bin;
    }
    ++users[power_word(best) % kWarp];
    first_bins[static_cast<std::size_t>(lane)] = best;
  }
  return first_bins;
}

}  // namespace

SlicedBasis slice_basis(const MelTables& tables) {
  const int n_bands = static_cast<int>(tables.bands.size());
  SlicedBasis basis;
  for (int first = 0; first < n_bands; first += kWarp) {
    const int in_slice = std::min(kWarp, n_bands - first);
    const MelBand* bands = &tables.bands[static_cast<std::size_t>(first)];
    const int longest = std::max_element(bands, bands + in_slice, [](const MelBand& a, const MelBand& b) {
                         return a.n_bins < b.n_bins;
                         })->n_bins;
    const int n_bins = (longest + kSliceBins - 1) / kSliceBins * kSliceBins;
    basis.slices.push_back({static_cast<int>(basis.weights.size()), n_bins});
    WeightedWord* weights = &*basis.weights.insert(basis.weights.end(), static_cast<std::size_t>(kWarp * n_bins), {});
    const std::vector<int> first_bins = choose_first_bins(bands, in_slice, n_bins);
    for (int lane = 0; lane < in_slice; ++lane) {
      const int start = first_bins[static_cast<std::size_t>(lane)], shift = bands[lane].first_bin - start;
      for (int i = 0; i < n_bins; ++i) weights[kWarp * i + lane].word = power_word(start + i);
      for (int i = 0; i < bands[lane].n_bins; ++i) {
        const auto source = static_cast<std::size_t>(bands[lane].first_weight + i);
        weights[kWarp * (shift + i) + lane].weight = tables.weights[source];
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
