#include "mel_device.h"

#include <algorithm>
#include <cmath>
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

struct Segment {
  int first_bin = 0;
  std::vector<float> rising, falling;  // weights of its bins

  int n_bins() const { return static_cast<int>(rising.size()); }
};

constexpr int kSliceOverhead = 8;  // bins that take as long as what is done once for a slice

int round_up(int n_bins) { return (n_bins + kBinsPerStep - 1) / kBinsPerStep * kBinsPerStep; }

std::vector<Segment> find_segments(const MelTables& tables) {
  const int n_bands = static_cast<int>(tables.bands.size());
  std::vector<Segment> segments(static_cast<std::size_t>(n_bands) + 1);
  int segment = 0;
  for (int bin = 0; bin < kBins; ++bin) {
    int last = -1;  // band that this bin is in
    for (int band = 0; band < n_bands; ++band) {
      const MelBand& run = tables.bands[static_cast<std::size_t>(band)];
      if (bin >= run.first_bin && bin < run.first_bin + run.n_bins) last = band;
    }
    if (last < 0) continue;
    const auto weight = [&](int band) {
      if (band < 0 || band >= n_bands) return 0.0f;
      const MelBand& run = tables.bands[static_cast<std::size_t>(band)];
      const int i = bin - run.first_bin;
      return i < 0 || i >= run.n_bins ? 0.0f : tables.weights[static_cast<std::size_t>(run.first_weight + i)];
    };
    // A bin of two bands lies in the segment over which the second one rises; one at the edge of a segment has one.
    const bool falls = last == n_bands - 1 && weight(last - 1) == 0;
    segment = std::max(segment, falls ? n_bands : last);
    Segment& mine = segments[static_cast<std::size_t>(segment)];
    if (mine.n_bins() == 0) mine.first_bin = bin;
    mine.rising.push_back(weight(segment));
    mine.falling.push_back(weight(segment - 1));
  }
  return segments;
}

// First bin of each segment of a slice. One shorter than the slice may start earlier, over zero weights. All lanes step
// through the bins together, so segments that start in different banks of shared memory stay in different banks.
std::vector<int> choose_first_bins(const Segment* segments, int n_segments, int slice_bins) {
  std::vector<int> order(static_cast<std::size_t>(n_segments)), first_bins(kWarp, 0);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return segments[a].n_bins() > segments[b].n_bins(); });
  int users[kWarp] = {};  // of each bank
  for (const int lane : order) {  // those with the fewest possible starts first
    const Segment& segment = segments[lane];
    const int last = std::min(segment.first_bin, kBins - slice_bins);
    const int first = std::max(0, segment.first_bin + segment.n_bins() - slice_bins);
    int best = last;
    for (int bin = last; bin >= first; --bin) {
      if (users[bin % kWarp] < users[best % kWarp]) best = bin;
    }
    ++users[best % kWarp];
    first_bins[static_cast<std::size_t>(lane)] = best;
  }
  return first_bins;
}

Turn turn_by(double angle) {
  const double cos = std::cos(angle), sin = std::sin(angle);
  // Near a right angle a tangent that is not too large: the cosine's part is far below float's rounding.
  if (std::abs(cos) < 0x1p-30) return {0x1p-30f, static_cast<float>(sin * 0x1p30)};
  return {static_cast<float>(cos), static_cast<float>(sin / cos)};
}

Quad two_turns(double first, double second) {
  const Turn a = turn_by(first), b = turn_by(second);
  return {a.cos, a.tan, b.cos, b.tan};
}

}  // namespace

std::vector<Quad> make_transform_table() {
  constexpr double circle = 2 * 3.14159265358979323846;
  const auto window = [](int sample) { return static_cast<float>(-std::cos(circle * sample / kFftSize)); };
  // Turn `index` of a row: half / 2 to half - 1 are those of the stage with pairs `half` apart (of the first one: 0),
  // theta to the power 16 / half times the j-th root for DFTs of 2 half points. theta = exp(-2 pi i lane / kPoints).
  const auto row_angle = [](int lane, int index) {
    int half = 1;
    while (half <= index) half *= 2;
    return circle * (static_cast<double>(lane) / kPoints * (kWarp / 2 / half) + (index - half / 2) / (2.0 * half));
  };
  const auto fill = [](std::vector<Quad>& table, auto quad) {
    for (int i = 0; i < 8; ++i) {
      for (int lane = 0; lane < kWarp; ++lane) table.push_back(quad(i, lane));
    }
  };
  std::vector<Quad> table;
  fill(table, [&](int n1, int lane) {
    const int sample = 2 * (lane + kWarp * n1), on = sample + 2 * kWarp * 8;
    return Quad{window(sample), window(sample + 1), window(on), window(on + 1)};
  });
  fill(table, [&](int i, int lane) { return two_turns(row_angle(lane, 2 * i), row_angle(lane, 2 * i + 1)); });
  fill(table, [&](int i, int lane) {
    const int bin = lane + kWarp * 2 * i;
    return two_turns(circle * bin / kFftSize, circle * (bin + kWarp) / kFftSize);
  });
  return table;
}

// Numbers of bands of slices with the fewest steps.
std::vector<int> cut_slices(const std::vector<Segment>& segments) {
  const int n_bands = static_cast<int>(segments.size()) - 1;
  std::vector<int> costs(segments.size(), 0), sizes(segments.size(), 0);  // of the bands before
  for (int end = 1; end <= n_bands; ++end) {
    int longest = segments[static_cast<std::size_t>(end)].n_bins();
    for (int size = 1; size < kWarp && size <= end; ++size) {
      longest = std::max(longest, segments[static_cast<std::size_t>(end - size)].n_bins());
      const int cost = costs[static_cast<std::size_t>(end - size)] + kSliceOverhead + round_up(longest);
      if (size == 1 || cost <= costs[static_cast<std::size_t>(end)]) {
        costs[static_cast<std::size_t>(end)] = cost;
        sizes[static_cast<std::size_t>(end)] = size;
      }
    }
  }
  std::vector<int> slices;
  for (int end = n_bands; end > 0; end -= slices.back()) slices.push_back(sizes[static_cast<std::size_t>(end)]);
  std::reverse(slices.begin(), slices.end());
  return slices;
}

// First slice of each warp of a block, and at the end their number. Each has contiguous ones, such that the warp with
// most to do has as little as possible.
std::vector<int> share_slices(const std::vector<MelSlice>& slices) {
  const auto share = [&](int limit) {  // one more for each warp that the limit makes necessary
    std::vector<int> first_slices = {0};
    int load = 0;
    for (std::size_t i = 0; i < slices.size(); ++i) {
      const int cost = slices[i].n_bins + kSliceOverhead;
      if (load > 0 && load + cost > limit) {
        first_slices.push_back(static_cast<int>(i));
        load = 0;
      }
      load += cost;
    }
    return first_slices;
  };
  int limit = 0;
  for (const MelSlice& slice : slices) limit = std::max(limit, slice.n_bins + kSliceOverhead);
  while (share(limit).size() > kFramesPerBlock) ++limit;
  std::vector<int> first_slices = share(limit);
  first_slices.resize(kFramesPerBlock + 1, static_cast<int>(slices.size()));
  return first_slices;
}

SlicedBasis slice_basis(const MelTables& tables) {
  const std::vector<Segment> segments = find_segments(tables);
  SlicedBasis basis;
  int first_band = 0;
  for (const int n_bands : cut_slices(segments)) {
    const Segment* part = &segments[static_cast<std::size_t>(first_band)];
    int longest = 0;
    for (int lane = 0; lane <= n_bands; ++lane) longest = std::max(longest, part[lane].n_bins());
    const int n_bins = round_up(longest);
    basis.slices.push_back({first_band, n_bands, n_bins, static_cast<int>(basis.weights.size())});
    Quad* weights = &*basis.weights.insert(basis.weights.end(), static_cast<std::size_t>(kWarp * n_bins / 2), Quad{});
    const std::vector<int> first_bins = choose_first_bins(part, n_bands + 1, n_bins);
    basis.first_bins.insert(basis.first_bins.end(), first_bins.begin(), first_bins.end());
    for (int lane = 0; lane <= n_bands; ++lane) {
      const int shift = part[lane].first_bin - first_bins[static_cast<std::size_t>(lane)];
      for (int i = 0; i < part[lane].n_bins(); ++i) {
        Quad& two = weights[kWarp * ((shift + i) / 2) + lane];
        const auto at = static_cast<std::size_t>(i);
        ((shift + i) % 2 == 0 ? two.a : two.c) = part[lane].rising[at];
        ((shift + i) % 2 == 0 ? two.b : two.d) = part[lane].falling[at];
      }
    }
    first_band += n_bands;
  }
  basis.first_slices = share_slices(basis.slices);
  return basis;
}

void check_voice(const VoiceJob& job) {
  const auto require = [](bool ok, const char* message) {
    if (!ok) throw std::invalid_argument(message);
  };
  require(job.channels == 1 || job.channels == 2, "a voice has one or two channels");
  require(job.segment >= 1 && job.crop_samples >= 1, "segment and crop_samples must be positive");
  require(job.samples >= 0 && job.samples <= job.crop_samples, "samples must lie in [0, crop_samples]");
  require(job.first >= 0 && job.samples <= job.stride - job.first, "the crop reaches beyond the voice");
}

DeviceMel::DeviceMel(const MelOptions& options) : options_(options) {
  if (options.crop_samples % 2 != 0) {
    throw std::invalid_argument("on a GPU crop_samples must be even, because samples are read in pairs; it is " +
                                std::to_string(options.crop_samples));
  }
}

std::size_t DeviceMel::scratch_bytes(int crops) const {
  const int warps = blocks_per_crop(options_) * kFramesPerBlock;  // each writes a maximum
  const std::size_t floats = options_.mel_size() + static_cast<std::size_t>(warps);
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
  launch(NormaliseJob{options_.n_mels, options_.n_frames(), blocks * kFramesPerBlock, options_.log_divisor,
                      job.power_only, job.mel, job.maxima, pointer<void>(out)},
         type, crops, stream);
}

}  // namespace singerembed
