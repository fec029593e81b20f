// What encoder.cc and encoder_int8.cc share.
#pragma once

#include "encoder.h"

namespace singerembed {

constexpr int kCropsTogether = 4;

// Of a map in 8 bits: x = step (q - zero).
struct Rounding {
  float step = 1;
  int zero = 0;
};

// What a call needs besides the weights.
struct Encoder::Workspace {
  AlignedFloats log_mel;          // [n_mels][n_frames]
  AlignedFloats image;            // the same with a border of zeros
  AlignedFloats maps[2];          // outputs of bottlenecks, by turns
  AlignedFloats entries;          // input of the first late bottleneck, of each crop
  AlignedFloats spread;           // output of a depthwise convolution, of each crop
  AlignedFloats ring;             // rows of an expansion, with borders of zeros: [panel_blocks][size][padded row]
  AlignedFloats zero_row;
  AlignedFloats gated_weights;
  AlignedFloats sums, squeezed, gate;  // [blocks][crops][16]
  AlignedFloats ones;                  // of 8 bits: factors of a map that is not gated
  AlignedArray<std::uint8_t> quantised;  // input of a 1 x 1 convolution in 8 bits, of each crop
  Rounding roundings[kCropsTogether];
  std::size_t late_map = 0, entry = 0, late_spread = 0;  // floats of a crop
  std::size_t late_quantised = 0;                         // bytes
};

struct Encoder::Pass {  // of `crops` crops through a bottleneck
  const Bottleneck& layers;
  const BottleneckShape& shape;
  Workspace& at;
  int crops;
  Maps in, spread, out;
  bool gates_map;  // instead of the projection's weights
};

}  // namespace singerembed
