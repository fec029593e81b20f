#include "encoder_network.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace singerembed {
namespace {

constexpr int kStemTaps = 9, kStemPositions = 9;
constexpr int kSmallestSide = 32, kLargestSide = 4096, kLargestDim = 65536;

// See encoder_isa.h: factors on what a layer reads after a SiLU, and on what it writes before one.
constexpr double kAfterSilu = -0.69314718055994530942, kBeforeSilu = -1.44269504088896340736;

std::vector<BottleneckShape> shapes(int height, int width) {
  struct Stage {
    int expansion, size, stride, in, out, n;
  };
  constexpr Stage kStages[] = {{1, 3, 1, kStemChannels, 16, 1}, {6, 3, 2, 16, 24, 2},   {6, 5, 2, 24, 40, 2},
                               {6, 3, 2, 40, 80, 3},            {6, 5, 1, 80, 112, 3},  {6, 5, 2, 112, 192, 4},
                               {6, 3, 1, 192, 320, 1}};
  std::vector<BottleneckShape> all;
  for (const Stage& stage : kStages) {
    for (int i = 0; i < stage.n; ++i) {
      BottleneckShape s{};
      s.in = i == 0 ? stage.in : stage.out;
      s.expanded = s.in * stage.expansion;
      s.squeezed = s.in / 4;
      s.out = stage.out;
      s.size = stage.size;
      s.stride = i == 0 ? stage.stride : 1;
      s.in_height = height;
      s.in_width = width;
      s.out_height = height = (height - 1) / s.stride + 1;
      s.out_width = width = (width - 1) / s.stride + 1;
      s.first = all.empty();
      s.residual = s.stride == 1 && s.in == s.out;
      all.push_back(s);
    }
  }
  return all;
}

class Reader {
 public:
  Reader(const float* weights, std::size_t n) : next_(weights), left_(n) {}

  const float* take(int rows, int columns) {
    const std::size_t n = static_cast<std::size_t>(rows) * columns;
    if (n > left_) throw std::invalid_argument("the encoder has more weights than were given");
    const float* taken = next_;
    next_ += n;
    left_ -= n;
    return taken;
  }

  std::size_t left() const { return left_; }

 private:
  const float* next_;
  std::size_t left_;
};

// [out][in] times `factor`, to [panel][in][16 panel_blocks] with zeros after the last output.
AlignedFloats pack(const float* weights, int out, int in, int panel_blocks, double factor) {
  AlignedFloats packed = allocate_floats(static_cast<std::size_t>(padded(out)) * in);
  float* next = packed.get();
  for (int block = 0; block < blocks_of(out); block += panel_blocks) {
    const int first = block * kBlock, end = std::min(first + panel_blocks * kBlock, padded(out));
    for (int k = 0; k < in; ++k) {
      for (int n = first; n < end; ++n) {
        *next++ = n < out ? static_cast<float>(weights[static_cast<std::size_t>(n) * in + k] * factor) : 0.0f;
      }
    }
  }
  return packed;
}

// `before` and `after`: the scales of the input and of the output.
Convolution read_pointwise(Reader& reader, int out, int in, int panel_blocks, double before, double after) {
  const float* weights = reader.take(out, in);
  const float* bias = reader.take(out, 1);
  Convolution layer;
  layer.weights = pack(weights, out, in, panel_blocks, before * after);
  layer.bias = pack(bias, out, 1, 1, after);
  return layer;
}

// The same in 8 bits: of each output the largest weight becomes 127.
Convolution read_int8(Reader& reader, int out, int in, const Int8Kernels& kernels, double before, double after) {
  const float* weights = reader.take(out, in);
  Convolution layer;
  layer.bias = pack(reader.take(out, 1), out, 1, 1, after);
  layer.scale = allocate_floats(padded(out));
  layer.weight_sums = allocate_aligned<std::int32_t>(padded(out));
  const int group = kernels.group, bytes = 4 / group;
  layer.int8_weights = allocate_aligned<std::uint8_t>(static_cast<std::size_t>(padded(out)) * in * bytes);
  std::uint8_t* next = layer.int8_weights.get();
  std::fill_n(layer.scale.get(), padded(out), 0.0f);
  std::fill_n(layer.weight_sums.get(), padded(out), 0);
  for (int n = 0; n < out; ++n) {
    float largest = 0;
    for (int k = 0; k < in; ++k) largest = std::max(largest, std::fabs(weights[static_cast<std::size_t>(n) * in + k]));
    layer.scale[n] = static_cast<float>(largest * before * after / 127);
  }
  for (int block = 0; block < blocks_of(out); block += kernels.panel_blocks) {
    const int first = block * kBlock, end = std::min(first + kernels.panel_blocks * kBlock, padded(out));
    for (int k = 0; k < in; k += group) {
      for (int n = first; n < end; ++n) {
        for (int i = k; i < k + group; ++i) {
          const double x = n < out ? weights[static_cast<std::size_t>(n) * in + i] * before * after : 0;
          const double whole = x == 0 || layer.scale[n] == 0 ? 0 : std::nearbyint(x / layer.scale[n]);
          const auto value = static_cast<std::int16_t>(std::clamp(whole, -127.0, 127.0));
          const auto narrow = static_cast<std::int8_t>(value);
          layer.weight_sums[n] += value;
          std::memcpy(next, bytes == 1 ? static_cast<const void*>(&narrow) : &value, bytes);
          next += bytes;
        }
      }
    }
  }
  return layer;
}

Convolution read_depthwise(Reader& reader, int channels, int taps) {
  const float* weights = reader.take(channels, taps);
  const float* bias = reader.take(channels, 1);
  Convolution layer;
  layer.weights = pack(weights, channels, taps, 1, kAfterSilu * kBeforeSilu);
  layer.bias = pack(bias, channels, 1, 1, kBeforeSilu);
  return layer;
}

void check(const char* name, int value, int least, int most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", not from " +
                              std::to_string(least) + " to " + std::to_string(most));
}

}  // namespace

EncoderNetwork pack_network(const EncoderOptions& options, const float* weights, std::size_t n, int panel_blocks,
                            const Int8Kernels* int8) {
  check("n_mels", options.n_mels, kSmallestSide, kLargestSide);
  check("n_frames", options.n_frames, kSmallestSide, kLargestSide);
  check("embedding_dim", options.embedding_dim, 1, kLargestDim);
  Reader reader(weights, n);
  const auto read_large = [&](int out, int in, double before, double after) {
    return int8 ? read_int8(reader, out, in, *int8, before, after)
                : read_pointwise(reader, out, in, panel_blocks, before, after);
  };
  EncoderNetwork network;
  const float* stem = reader.take(kStemChannels, kStemTaps);
  network.stem.weights = pack(stem, kStemChannels, kStemTaps, blocks_of(kStemChannels), kBeforeSilu);
  const float* bias = reader.take(kStemPositions, kStemChannels);
  network.stem.bias = pack(bias, kStemPositions * kStemChannels, 1, 1, kBeforeSilu);
  for (const BottleneckShape& s : shapes((options.n_mels - 1) / 2 + 1, (options.n_frames - 1) / 2 + 1)) {
    Bottleneck b{s, {}, {}, {}, {}, {}};
    if (!s.first) b.expand = read_large(s.expanded, s.in, 1, kBeforeSilu);
    b.depthwise = read_depthwise(reader, s.expanded, s.size * s.size);
    const double mean = kAfterSilu / s.out_pixels();  // it reads sums
    b.squeeze = read_pointwise(reader, s.squeezed, s.expanded, panel_blocks, mean, kBeforeSilu);
    b.excite = read_pointwise(reader, s.expanded, s.squeezed, panel_blocks, kAfterSilu, kBeforeSilu);
    b.project = read_large(s.out, s.expanded, kAfterSilu, 1);
    network.bottlenecks.push_back(std::move(b));
  }
  const BottleneckShape& last = network.bottlenecks.back().shape;
  network.head = read_large(kHeadChannels, last.out, 1, kBeforeSilu);
  network.classifier = read_pointwise(reader, options.embedding_dim, kHeadChannels, panel_blocks,
                                      kAfterSilu / last.out_pixels(), 1);
  if (reader.left() > 0) throw std::invalid_argument("there are more weights than the encoder has");
  return network;
}

}  // namespace singerembed
