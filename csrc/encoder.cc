#include "encoder_workspace.h"

#include <algorithm>
#include <utility>

#include "isa.h"

namespace singerembed {
namespace {

constexpr int kLatePixels = 64;  // of an output; with more, a bottleneck's maps are larger than its weights

std::vector<const EncoderKernels*> all_supported() {  // narrowest first
#ifdef SE_X86
  return supported_kernels({&kPortableEncoder, &kAvx2Encoder, &kAvx512Encoder});
#else
  return supported_kernels({&kPortableEncoder});
#endif
}

std::vector<const Int8Kernels*> all_supported_int8() {
#ifdef SE_X86
  return supported_kernels({&kPortableInt8, &kAvx2Int8, &kAvx512Int8, &kVnniInt8});
#else
  return supported_kernels({&kPortableInt8});
#endif
}

std::size_t find_first_late(const std::vector<Bottleneck>& bottlenecks) {
  std::size_t i = 1;
  while (i + 1 < bottlenecks.size() && bottlenecks[i].shape.out_pixels() > kLatePixels) ++i;
  return i;
}

AlignedFloats zeros(std::size_t n) {
  AlignedFloats floats = allocate_floats(n);
  std::fill_n(floats.get(), n, 0.0f);
  return floats;
}

}  // namespace

std::vector<const char*> available_int8_isas() {
  std::vector<const char*> names;
  for (const Int8Kernels* kernels : all_supported_int8()) names.push_back(kernels->name);
  return names;
}

// A workspace that no other thread uses.
class Encoder::Loan {
 public:
  explicit Loan(const Encoder& encoder) : encoder_(encoder) {
    {
      const std::lock_guard<std::mutex> lock(encoder.mutex_);
      if (!encoder.idle_.empty()) {
        workspace_ = std::move(encoder.idle_.back());
        encoder.idle_.pop_back();
      } else {
        encoder.idle_.reserve(++encoder.workspaces_);  // so that the destructor need not allocate
      }
    }
    if (!workspace_) workspace_ = encoder.new_workspace();
  }
  ~Loan() {
    const std::lock_guard<std::mutex> lock(encoder_.mutex_);
    encoder_.idle_.push_back(std::move(workspace_));
  }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;

  Workspace& operator*() const { return *workspace_; }

 private:
  const Encoder& encoder_;
  std::unique_ptr<Workspace> workspace_;
};

Encoder::Encoder(const EncoderOptions& options, const float* weights, std::size_t n, const char* isa)
    : options_(options),
      int8_(options.int8 ? find_kernels(all_supported_int8(), isa) : nullptr),
      kernels_(find_kernels(all_supported(), isa)),
      network_(pack_network(options, weights, n, kernels_->panel_blocks, int8_)),
      first_late_(find_first_late(network_.bottlenecks)) {}

Encoder::~Encoder() = default;

std::unique_ptr<Encoder::Workspace> Encoder::new_workspace() const {
  auto at = std::make_unique<Workspace>();
  std::size_t early_map = 0, spread = 0, ring = 0, row = 0, gated = 0, quantised = 0;
  int widest = kHeadChannels;
  for (std::size_t i = 0; i < network_.bottlenecks.size(); ++i) {
    const BottleneckShape& s = network_.bottlenecks[i].shape;
    const std::size_t map = map_floats(s.out, s.out_pixels()), spread_map = map_floats(s.expanded, s.out_pixels());
    std::size_t& largest_map = i < first_late_ ? early_map : at->late_map;
    std::size_t& largest_spread = i < first_late_ ? spread : at->late_spread;
    largest_map = std::max(largest_map, map);
    largest_spread = std::max(largest_spread, spread_map);
    if (i + 1 == first_late_) at->entry = map;
    if (int8_) {
      std::size_t& largest = i < first_late_ ? quantised : at->late_quantised;
      largest = std::max(largest, std::max(spread_map, map_floats(s.in, s.in_pixels())) * int8_->activation_bytes);
    }
    ring = std::max(ring, s.padded_row() * s.size * std::max(group_blocks(), blocks_of(kStemChannels)));
    row = std::max(row, s.padded_row());
    if (i < first_late_ && !int8_) gated = std::max(gated, static_cast<std::size_t>(s.expanded) * padded(s.out));
    widest = std::max(widest, padded(s.expanded));
  }
  const BottleneckShape& last = network_.bottlenecks.back().shape;
  at->late_spread = std::max(at->late_spread, map_floats(kHeadChannels, last.out_pixels()));
  widest = std::max(widest, padded(options_.embedding_dim));
  const std::size_t n_mels = options_.n_mels, n_frames = options_.n_frames;
  at->log_mel = zeros(n_mels * n_frames);
  at->image = zeros((n_mels + 2) * (n_frames + 2));
  for (AlignedFloats& map : at->maps) map = zeros(std::max(early_map, kCropsTogether * at->late_map));
  at->entries = zeros(kCropsTogether * at->entry);
  at->spread = zeros(std::max(spread, kCropsTogether * at->late_spread));
  at->ring = zeros(ring);
  at->zero_row = zeros(row);
  at->gated_weights = zeros(gated);
  if (int8_) {
    const std::size_t bytes = std::max(quantised, kCropsTogether * at->late_quantised);
    at->quantised = allocate_aligned<std::uint8_t>(bytes);
    at->ones = zeros(kBlock);
    std::fill_n(at->ones.get(), kBlock, 1.0f);
  }
  for (AlignedFloats* vectors : {&at->sums, &at->squeezed, &at->gate}) {
    *vectors = zeros(static_cast<std::size_t>(widest) * kCropsTogether);
  }
  return at;
}

std::size_t Encoder::embed(std::size_t crops, const Source& source, float* embeddings) const {
  const Loan loan(*this);
  Workspace& at = *loan;
  std::size_t embedded = 0;
  int waiting = 0;
  const auto flush = [&] {
    if (waiting == 0) return;
    run_late(at, waiting, nullptr, embeddings + embedded * options_.embedding_dim);
    embedded += waiting;
    waiting = 0;
  };
  for (std::size_t crop = 0; crop < crops; ++crop) {
    if (!source(crop, at.log_mel.get())) continue;
    run_early(at, waiting++, nullptr);
    if (waiting == kCropsTogether) flush();
  }
  flush();
  return embedded;
}

void Encoder::trace(const float* log_mel, const Observer& observe, float* embedding) const {
  const Loan loan(*this);
  Workspace& at = *loan;
  std::copy_n(log_mel, static_cast<std::size_t>(options_.n_mels) * options_.n_frames, at.log_mel.get());
  run_early(at, 0, observe);
  run_late(at, 1, observe, embedding);
}

// Runs one crop as far as its place among the entries.
void Encoder::run_early(Workspace& at, int crop, const Observer& observe) const {
  const std::size_t width = options_.n_frames;
  for (int row = 0; row < options_.n_mels; ++row) {
    std::copy_n(at.log_mel.get() + row * width, width, at.image.get() + (row + 1) * (width + 2) + 1);
  }
  float* in = nullptr;
  for (std::size_t i = 0; i < first_late_; ++i) {
    const Bottleneck& layers = network_.bottlenecks[i];
    float* out = i + 1 == first_late_ ? at.entries.get() + crop * at.entry : at.maps[i % 2].get();
    const bool gates_map = padded(layers.shape.out) >= layers.shape.out_pixels();
    run_bottleneck({layers, layers.shape, at, 1, {in, 0}, {at.spread.get(), 0}, {out, 0}, gates_map});
    if (observe) observe(layers.shape, out);
    in = out;
  }
}

// Runs the crops among the entries to their embeddings.
void Encoder::run_late(Workspace& at, int crops, const Observer& observe, float* embeddings) const {
  Maps in{at.entries.get(), at.entry};
  const Maps spread{at.spread.get(), at.late_spread};
  for (std::size_t i = first_late_; i < network_.bottlenecks.size(); ++i) {
    const Bottleneck& layers = network_.bottlenecks[i];
    const Maps out{at.maps[i % 2].get(), at.late_map};
    run_bottleneck({layers, layers.shape, at, crops, in, spread, out, true});
    if (observe) observe(layers.shape, out.first);
    in = out;
  }
  run_head(at, crops, in, spread);
  const int pixels = network_.bottlenecks.back().shape.out_pixels();
  const std::size_t stride = static_cast<std::size_t>(crops) * kBlock;
  for (int crop = 0; crop < crops; ++crop) {
    kernels_->pool(spread.of(crop), blocks_of(kHeadChannels), pixels, at.sums.get() + crop * kBlock, stride);
  }
  float* out = at.gate.get();
  convolve_vectors(network_.classifier, kHeadChannels, options_.embedding_dim, crops, at.sums.get(), out,
                   Activation::kNone);
  for (int crop = 0; crop < crops; ++crop) {
    for (int i = 0; i < options_.embedding_dim; ++i) {
      *embeddings++ = out[i / kBlock * stride + crop * kBlock + i % kBlock];
    }
  }
}

void Encoder::run_head(Workspace& at, int crops, Maps in, Maps out) const {
  const BottleneckShape& last = network_.bottlenecks.back().shape;
  if (int8_) {
    for (int crop = 0; crop < crops; ++crop) {
      quantise(at, crop, in.of(crop), at.ones.get(), 0, last.out, last.out_pixels());
    }
    convolve_int8(at, network_.head, last.out, kHeadChannels, last.out_pixels(), crops, out, {}, Activation::kSilu);
    return;
  }
  PointwiseJob job{};
  job.in_stride = job.out_stride = static_cast<std::size_t>(last.out_pixels()) * kBlock;
  job.k = last.out;
  job.weights = network_.head.weights.get();
  job.bias = network_.head.bias.get();
  job.pixels = last.out_pixels();
  job.activation = Activation::kSilu;
  convolve(job, kHeadChannels, crops, in, out);
}

int Encoder::group_blocks() const { return int8_ ? int8_->panel_blocks : kernels_->panel_blocks; }

void Encoder::run_bottleneck(const Pass& pass) const {
  const BottleneckShape& s = pass.shape;
  const int blocks = blocks_of(s.expanded), group = s.first ? blocks : group_blocks();
  const int border = s.size / 2 * kBlock;
  for (int row = 0; row < group * s.size; ++row) {
    float* start = pass.at.ring.get() + row * s.padded_row();
    std::fill_n(start, border, 0.0f);
    std::fill_n(start + s.padded_row() - border, border, 0.0f);
  }
  std::fill_n(pass.at.sums.get(), static_cast<std::size_t>(blocks) * pass.crops * kBlock, 0.0f);
  if (int8_ && !s.first) {
    for (int crop = 0; crop < pass.crops; ++crop) {
      quantise(pass.at, crop, pass.in.of(crop), pass.at.ones.get(), 0, s.in, s.in_pixels());
    }
  }
  for (int first = 0; first < blocks; first += group) {
    for (int crop = 0; crop < pass.crops; ++crop) spread_channels(pass, first, std::min(group, blocks - first), crop);
  }
  excite(pass);
  project(pass);
}

// Expansion and depthwise convolution of the blocks of channels [first, first + count) of a crop.
void Encoder::spread_channels(const Pass& pass, int first, int count, int crop) const {
  const BottleneckShape& s = pass.shape;
  const auto depthwise = kernels_->depthwise[s.size == 5][s.stride - 1];
  const Convolution& layer = pass.layers.depthwise;
  int filled = 0;
  for (int y = 0; y < s.out_height; ++y) {
    const int top = y * s.stride - s.size / 2;
    for (; filled < std::min(top + s.size, s.in_height); ++filled) fill_row(pass, first, count, crop, filled);
    for (int b = 0; b < count; ++b) {
      DepthwiseJob job{};
      for (int r = 0; r < s.size; ++r) {
        const int row = top + r;
        const bool outside = row < 0 || row >= s.in_height;
        job.rows[r] = outside ? pass.at.zero_row.get()
                              : pass.at.ring.get() + (b * s.size + row % s.size) * s.padded_row();
      }
      const int block = first + b;
      job.weights = layer.weights.get() + static_cast<std::size_t>(block) * s.size * s.size * kBlock;
      job.bias = layer.bias.get() + block * kBlock;
      job.out = pass.spread.of(crop) + (static_cast<std::size_t>(block) * s.out_pixels() + y * s.out_width) * kBlock;
      job.sums = pass.at.sums.get() + (block * pass.crops + crop) * kBlock;
      job.pixels = s.out_width;
      depthwise(job);
    }
  }
}

// Computes row `row` of the expansion into the ring.
void Encoder::fill_row(const Pass& pass, int first, int count, int crop, int row) const {
  const BottleneckShape& s = pass.shape;
  float* out = pass.at.ring.get() + row % s.size * s.padded_row() + s.size / 2 * kBlock;
  const std::size_t out_stride = s.padded_row() * s.size;
  if (s.first) {
    stem_row(pass, row, out, out_stride);
    return;
  }
  if (int8_) {
    fill_row_int8(pass, first, count, crop, row, out, out_stride);
    return;
  }
  PointwiseJob job{};
  job.in = pass.in.of(crop) + static_cast<std::size_t>(row) * s.in_width * kBlock;
  job.in_stride = static_cast<std::size_t>(s.in_pixels()) * kBlock;
  job.k = s.in;
  job.weights = pass.layers.expand.weights.get() + static_cast<std::size_t>(first) * kBlock * s.in;
  job.bias = pass.layers.expand.bias.get() + first * kBlock;
  job.out = out;
  job.out_stride = out_stride;
  job.blocks = count;
  job.pixels = s.in_width;
  job.activation = Activation::kSilu;
  kernels_->pointwise(job);
}

void Encoder::stem_row(const Pass& pass, int row, float* out, std::size_t out_stride) const {
  StemJob job{};
  for (int r = 0; r < 3; ++r) {
    job.rows[r] = pass.at.image.get() + static_cast<std::size_t>(2 * row + r) * (options_.n_frames + 2);
  }
  job.weights = network_.stem.weights.get();
  const int below = 2 * row + 1;  // the last row that it reads, if it is not below the image
  const float* bias = network_.stem.bias.get() + (row == 0 ? 0 : below < options_.n_mels ? 3 : 6) * kStemChannels;
  const bool ends_inside = options_.n_frames % 2 == 0;
  for (int i = 0; i < 3; ++i) job.bias[i] = bias + (i == 2 && ends_inside ? 1 : i) * kStemChannels;
  job.out = out;
  job.out_stride = out_stride;
  job.blocks = blocks_of(kStemChannels);
  job.pixels = pass.shape.in_width;
  kernels_->stem(job);
}

void Encoder::excite(const Pass& pass) const {
  const BottleneckShape& s = pass.shape;
  Workspace& at = pass.at;
  convolve_vectors(pass.layers.squeeze, s.expanded, s.squeezed, pass.crops, at.sums.get(), at.squeezed.get(),
                   Activation::kSilu);
  convolve_vectors(pass.layers.excite, s.squeezed, s.expanded, pass.crops, at.squeezed.get(), at.gate.get(),
                   Activation::kSigmoid);
}

void Encoder::project(const Pass& pass) const {
  const BottleneckShape& s = pass.shape;
  if (int8_) {
    const std::size_t stride = static_cast<std::size_t>(pass.crops) * kBlock;
    for (int crop = 0; crop < pass.crops; ++crop) {
      quantise(pass.at, crop, pass.spread.of(crop), pass.at.gate.get() + crop * kBlock, stride, s.expanded,
               s.out_pixels());
    }
    convolve_int8(pass.at, pass.layers.project, s.expanded, s.out, s.out_pixels(), pass.crops, pass.out,
                  s.residual ? pass.in : Maps{}, Activation::kNone);
    return;
  }
  PointwiseJob job{};
  job.in_stride = job.out_stride = static_cast<std::size_t>(s.out_pixels()) * kBlock;
  job.k = s.expanded;
  job.weights = pass.layers.project.weights.get();
  job.bias = pass.layers.project.bias.get();
  job.pixels = s.out_pixels();
  job.activation = Activation::kNone;
  const float* gate = pass.at.gate.get();
  if (pass.gates_map) {
    for (int crop = 0; crop < pass.crops; ++crop) {
      kernels_->scale_map(pass.spread.of(crop), gate + crop * kBlock, static_cast<std::size_t>(pass.crops) * kBlock,
                          blocks_of(s.expanded), s.out_pixels());
    }
  } else {
    float* gated = pass.at.gated_weights.get();
    for (int block = 0; block < blocks_of(s.out); block += kernels_->panel_blocks) {
      const int width = std::min(kernels_->panel_blocks, blocks_of(s.out) - block) * kBlock;
      const std::size_t panel = static_cast<std::size_t>(block) * kBlock * s.expanded;
      kernels_->scale_rows(job.weights + panel, gate, gated + panel, s.expanded, width);
    }
    job.weights = gated;
  }
  convolve(job, s.out, pass.crops, pass.spread, pass.out, s.residual ? pass.in : Maps{});
}

// Completes `job` for all blocks of `channels` output channels, a panel at a time for all crops.
void Encoder::convolve(PointwiseJob job, int channels, int crops, Maps in, Maps out, Maps residual) const {
  const int panel = kernels_->panel_blocks;
  const std::size_t panel_weights = static_cast<std::size_t>(panel) * kBlock * job.k;
  for (int block = 0; block < blocks_of(channels); block += panel) {
    job.blocks = std::min(panel, blocks_of(channels) - block);
    for (int crop = 0; crop < crops; ++crop) {
      job.in = in.of(crop);
      job.out = out.of(crop) + block * job.out_stride;
      job.residual = residual.first ? residual.of(crop) + block * job.out_stride : nullptr;
      kernels_->pointwise(job);
    }
    job.weights += panel_weights;
    job.bias += panel * kBlock;
  }
}

// A dense layer: a map whose pixels are the crops.
void Encoder::convolve_vectors(const Convolution& layer, int k, int channels, int crops, float* in, float* out,
                               Activation activation) const {
  PointwiseJob job{};
  job.in_stride = job.out_stride = static_cast<std::size_t>(crops) * kBlock;
  job.k = k;
  job.weights = layer.weights.get();
  job.bias = layer.bias.get();
  job.pixels = crops;
  job.activation = activation;
  convolve(job, channels, 1, {in, 0}, {out, 0});
}

}  // namespace singerembed
