// Interface between encoder.cc and encoder_lanes.inc, which is compiled once per instruction set. Plain pointers only,
// for the reason given in mel_isa.h.
//
// A map is stored in blocks of 16 channels: [block][pixel][16]. Channels after the last are zero.
//
// Scales: a convolution before a SiLU or a sigmoid computes z = -log2(e) x, and what is stored after a SiLU is
// z / (1 + 2^z), which is SiLU(x) without the factor -ln 2. Both factors are in the weights: one multiplication less
// for each of five million activations of a crop.
#pragma once

#include <cstddef>
#include <cstdint>

namespace singerembed {

constexpr int kBlock = 16;  // channels: one vector of AVX-512, two of AVX2

enum class Activation { kNone, kSilu, kSigmoid };

// A 1 x 1 convolution: out[n][p] = activation(bias[n] + sum over k of weights[k][n] in[k][p]) + residual[n][p].
struct PointwiseJob {
  const float* in;         // [blocks of input channels][in_stride]
  std::size_t in_stride;   // floats from a block to the next
  int k;                   // input channels
  const float* weights;    // [k][16 blocks]
  const float* bias;       // [16 blocks]
  const float* residual;   // as `out`, or null; only without an activation
  float* out;              // [blocks][out_stride]
  std::size_t out_stride;
  int blocks;              // of output channels, at most panel_blocks
  int pixels;
  Activation activation;
};

// One row of the first convolution: 3 x 3, stride 2, from one channel, with SiLU.
struct StemJob {
  const float* rows[3];    // each from one pixel left of the image on
  const float* weights;    // [9][16 blocks]
  const float* bias[3];    // for the first pixel of the row, an inner one, the last: [16 blocks]
  float* out;              // [blocks][out_stride]
  std::size_t out_stride;
  int blocks, pixels;
};

// One row of a depthwise convolution with SiLU, for one block of channels.
struct DepthwiseJob {
  const float* rows[5];    // input rows, each from size / 2 pixels left of the image on: [pixels][16]
  const float* weights;    // [size][size][16]
  const float* bias;       // [16]
  float* out;              // [pixels][16]
  float* sums;             // [16], to which the outputs are added
  int pixels;              // of the output
};

struct EncoderKernels {
  const char* name;
  bool (*supported)();
  int panel_blocks;  // output blocks that a pointwise convolution computes together
  void (*pointwise)(const PointwiseJob& job);
  void (*stem)(const StemJob& job);
  void (*depthwise[2][2])(const DepthwiseJob& job);  // for size 3 and 5, for stride 1 and 2
  // out[i][j] = in[i][j] factors[i], j < width, a multiple of 16
  void (*scale_rows)(const float* in, const float* factors, float* out, int rows, int width);
  // map[block][p][c] *= factors[block * factor_stride + c]
  void (*scale_map)(float* map, const float* factors, std::size_t factor_stride, int blocks, int pixels);
  // sums[block * sum_stride + c] = sum over p of map[block][p][c]
  void (*pool)(const float* map, int blocks, int pixels, float* sums, std::size_t sum_stride);
};

// A 1 x 1 convolution of a map in 8 bits, x = step (q - zero), with weights in 8 bits, w[k][n] = scale[n] v[k][n]:
// out[n][p] = activation(bias[n] + step scale[n] sum over k of v[k][n] (q[k][p] - zero)) + residual[n][p]. Sums are exact.
struct Int8Job {
  const void* in;          // [blocks of input channels][in_stride], of activation_bytes each
  std::size_t in_stride;   // elements from a block to the next
  int k;                   // input channels, a multiple of 4
  const void* weights;     // [k / group][16 blocks][group], of 4 / group bytes each
  const std::int32_t* weight_sums;  // sums over k of v[k][n], [16 blocks]
  const float* scale;      // [16 blocks]
  const float* bias;       // [16 blocks]
  float step;
  int zero;
  const float* residual;   // as `out`, or null; only without an activation
  float* out;              // [blocks][out_stride]
  std::size_t out_stride;  // floats
  int blocks;              // of output channels, at most panel_blocks
  int pixels;
  Activation activation;   // not kSigmoid
};

struct MapRange {
  float low, high;  // never above or below 0
  float sum;        // neither finite if the map holds NaN or infinity
};

struct Int8Kernels {
  const char* name;
  bool (*supported)();
  int panel_blocks;
  int group;                     // input channels that are multiplied together
  std::size_t activation_bytes;  // of a number of a map
  void (*pointwise)(const Int8Job& job);
  // The range of map[block][p][c] * factors[block * factor_stride + c].
  MapRange (*range)(const float* map, const float* factors, std::size_t factor_stride, int blocks, int pixels);
  // out[block][p][c] = the same times `scale`, rounded, plus `zero`, clamped to 0 and 255; 0 for NaN.
  void (*quantise)(const float* map, const float* factors, std::size_t factor_stride, int blocks, int pixels,
                   float scale, int zero, void* out);
};

extern const EncoderKernels kPortableEncoder;
extern const Int8Kernels kPortableInt8;
#ifdef SE_X86
extern const EncoderKernels kAvx2Encoder;
extern const EncoderKernels kAvx512Encoder;
extern const Int8Kernels kAvx2Int8;
extern const Int8Kernels kAvx512Int8;
extern const Int8Kernels kVnniInt8;
#endif

}  // namespace singerembed
