#include <algorithm>
#include <cmath>
#include <limits>

#include "encoder_workspace.h"

namespace singerembed {
namespace {

constexpr float kLevels = 255;
constexpr float kSmallestStep = 1e-30f;  // of smaller ones the reciprocal is infinite

// A map that holds NaN or infinity gets NaN for a step, so that its embedding is NaN too.
Rounding rounding_of(const MapRange& range) {
  const float step = (range.high - range.low) / kLevels;
  if (!std::isfinite(range.sum) || !std::isfinite(step)) return {std::numeric_limits<float>::quiet_NaN(), 0};
  if (step < kSmallestStep) return {1, 0};
  return {step, static_cast<int>(std::nearbyint(-range.low / step))};
}

}  // namespace

// Stores map x factors (see Int8Kernels) in 8 bits as the input of crop `crop`. The range is the map's own.
void Encoder::quantise(Workspace& at, int crop, const float* map, const float* factors, std::size_t factor_stride,
                       int channels, int pixels) const {
  const int blocks = blocks_of(channels);
  const Rounding rounding = rounding_of(int8_->range(map, factors, factor_stride, blocks, pixels));
  at.roundings[crop] = rounding;
  int8_->quantise(map, factors, factor_stride, blocks, pixels, 1 / rounding.step, rounding.zero,
                  at.quantised.get() + crop * at.late_quantised);
}

// Computes row `row` of the expansion of the blocks of channels [first, first + count) to `out`.
void Encoder::fill_row_int8(const Pass& pass, int first, int count, int crop, int row, float* out,
                            std::size_t out_stride) const {
  const BottleneckShape& s = pass.shape;
  const Convolution& layer = pass.layers.expand;
  const std::size_t row_bytes = static_cast<std::size_t>(s.in_width) * kBlock * int8_->activation_bytes;
  Int8Job job{};
  job.in = pass.at.quantised.get() + crop * pass.at.late_quantised + row * row_bytes;
  job.in_stride = static_cast<std::size_t>(s.in_pixels()) * kBlock;
  job.k = s.in;
  job.weights = layer.int8_weights.get() + static_cast<std::size_t>(first) * kBlock * s.in * (4 / int8_->group);
  job.weight_sums = layer.weight_sums.get() + first * kBlock;
  job.scale = layer.scale.get() + first * kBlock;
  job.bias = layer.bias.get() + first * kBlock;
  job.step = pass.at.roundings[crop].step;
  job.zero = pass.at.roundings[crop].zero;
  job.out = out;
  job.out_stride = out_stride;
  job.blocks = count;
  job.pixels = s.in_width;
  job.activation = Activation::kSilu;
  int8_->pointwise(job);
}

// As `convolve`, of the crops' inputs in the workspace.
void Encoder::convolve_int8(Workspace& at, const Convolution& layer, int k, int channels, int pixels, int crops,
                            Maps out, Maps residual, Activation activation) const {
  Int8Job job{};
  job.in_stride = job.out_stride = static_cast<std::size_t>(pixels) * kBlock;
  job.k = k;
  job.pixels = pixels;
  job.activation = activation;
  for (int block = 0; block < blocks_of(channels); block += int8_->panel_blocks) {
    const int first = block * kBlock;
    job.weights = layer.int8_weights.get() + static_cast<std::size_t>(first) * k * (4 / int8_->group);
    job.weight_sums = layer.weight_sums.get() + first;
    job.scale = layer.scale.get() + first;
    job.bias = layer.bias.get() + first;
    job.blocks = std::min(int8_->panel_blocks, blocks_of(channels) - block);
    for (int crop = 0; crop < crops; ++crop) {
      job.in = at.quantised.get() + crop * at.late_quantised;
      job.step = at.roundings[crop].step;
      job.zero = at.roundings[crop].zero;
      job.out = out.of(crop) + block * job.out_stride;
      job.residual = residual.first ? residual.of(crop) + block * job.out_stride : nullptr;
      int8_->pointwise(job);
    }
  }
}

}  // namespace singerembed
