// The encoder's layers: EfficientNet-B0's shapes for one size of spectrogram, and its weights as the kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "encoder_isa.h"

namespace singerembed {

struct EncoderOptions {
  int n_mels = 0, n_frames = 0;  // of the log-mel spectrogram
  int embedding_dim = 0;
  bool int8 = false;  // expansions, projections and the head in 8-bit integers; all else is FP32
};

// An inverted bottleneck: expansion (not in the first, where the stem takes its place), depthwise convolution,
// squeeze-and-excitation, projection.
struct BottleneckShape {
  int in, expanded, squeezed, out;  // channels
  int size, stride;                 // of the depthwise convolution
  int in_height, in_width, out_height, out_width;
  bool first;     // after the stem: in == expanded
  bool residual;  // its input is added to its output

  int in_pixels() const { return in_height * in_width; }
  int out_pixels() const { return out_height * out_width; }
  std::size_t padded_row() const { return static_cast<std::size_t>(in_width + 2 * (size / 2)) * kBlock; }  // floats
};

struct Convolution {
  AlignedFloats weights, bias;
  // Of a layer in 8 bits, which has no `weights`: see Int8Job.
  AlignedArray<std::uint8_t> int8_weights;
  AlignedArray<std::int32_t> weight_sums;
  AlignedFloats scale;
};

struct Bottleneck {
  BottleneckShape shape;
  Convolution expand, depthwise, squeeze, excite, project;
};

struct EncoderNetwork {
  Convolution stem;  // 3 x 3; biases for 3 x 3 positions: at the upper or left border, inside, at the lower or right
  std::vector<Bottleneck> bottlenecks;
  Convolution head, classifier;
};

constexpr int kStemChannels = 32, kHeadChannels = 1280;

constexpr int blocks_of(int channels) { return (channels + kBlock - 1) / kBlock; }
constexpr int padded(int channels) { return blocks_of(channels) * kBlock; }
inline std::size_t map_floats(int channels, int pixels) { return static_cast<std::size_t>(padded(channels)) * pixels; }

// `weights`: n floats, batch norms folded, one layer after another, of each the weights as torch has them and the bias:
// stem [32][3][3] of one channel with bias [3][3][32], as above; of each bottleneck expansion, depthwise, squeeze,
// excitation, projection; head; classifier. Pointwise weights are packed in panels of `panel_blocks` blocks:
// [panel][input channels][16 panel_blocks]; if there are kernels `int8`, expansions, projections and the head for those:
// [panel][input channels / group][16 panel_blocks][group]. Throws std::invalid_argument if n is wrong, or an option is
// out of range.
EncoderNetwork pack_network(const EncoderOptions& options, const float* weights, std::size_t n, int panel_blocks,
                            const Int8Kernels* int8);

}  // namespace singerembed
