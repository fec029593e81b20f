// EfficientNet-B0 on the CPU, from log-mel spectrogram to embedding, written for maps that stay in a core's cache.
//
// A bottleneck runs a few channels at a time: rows of the expansion are computed into a ring of as many rows as the
// depthwise convolution reads, which follows at once, so the expanded map, the largest of the network, is never stored.
// Squeeze-and-excitation sums its pixels on the way out; the projection reads the gated map or gated weights, whichever
// are fewer numbers. Where weights are larger than the maps (from the sixth stage on), crops go through together.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "encoder_isa.h"
#include "encoder_network.h"

namespace singerembed {

// The instruction sets whose kernels for 8 bits this processor can run, narrowest first.
std::vector<const char*> available_int8_isas();

// Thread-safe, and after as many calls as there are threads without an allocation.
class Encoder {
 public:
  // `weights`: see pack_network. `isa`: one of available_isas(), or empty for the widest that this processor supports
  // (in 8 bits that may be "avx512-vnni").
  // Throws std::invalid_argument.
  Encoder(const EncoderOptions& options, const float* weights, std::size_t n, const char* isa = "");
  ~Encoder();
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  const EncoderOptions& options() const { return options_; }
  const char* isa() const { return int8_ ? int8_->name : kernels_->name; }

  // Calls `source(crop, log_mel)` for each of `crops` crops, which writes [n_mels][n_frames] and returns true, or
  // returns false for a crop to be left out. Writes the embeddings of the others, [embedding_dim] each, one after
  // another, and returns their number. The embedding of a crop has the same bits whatever the others are.
  using Source = std::function<bool(std::size_t crop, float* log_mel)>;
  std::size_t embed(std::size_t crops, const Source& source, float* embeddings) const;

  // As `embed` of one crop; calls `observe` with the output of each bottleneck, [blocks][pixels][16].
  using Observer = std::function<void(const BottleneckShape& shape, const float* map)>;
  void trace(const float* log_mel, const Observer& observe, float* embedding) const;

 private:
  struct Workspace;
  class Loan;
  struct Maps {  // of several crops
    float* first;
    std::size_t stride;  // floats from a crop to the next
    float* of(int crop) const { return first + crop * stride; }
  };
  struct Pass;

  std::unique_ptr<Workspace> new_workspace() const;
  void run_early(Workspace& at, int crop, const Observer& observe) const;
  void run_late(Workspace& at, int crops, const Observer& observe, float* embeddings) const;
  void run_head(Workspace& at, int crops, Maps in, Maps out) const;
  int group_blocks() const;  // of channels that a bottleneck runs together
  void run_bottleneck(const Pass& pass) const;
  void spread_channels(const Pass& pass, int first, int count, int crop) const;
  void fill_row(const Pass& pass, int first, int count, int crop, int row) const;
  void stem_row(const Pass& pass, int row, float* out, std::size_t out_stride) const;
  void excite(const Pass& pass) const;
  void project(const Pass& pass) const;
  void convolve(PointwiseJob job, int channels, int crops, Maps in, Maps out, Maps residual = {}) const;
  void convolve_vectors(const Convolution& layer, int k, int channels, int crops, float* in, float* out,
                        Activation activation) const;
  // In 8 bits, after `quantise` of each crop's input into the workspace (encoder_int8.cc):
  void quantise(Workspace& at, int crop, const float* map, const float* factors, std::size_t factor_stride,
                int channels, int pixels) const;
  void fill_row_int8(const Pass& pass, int first, int count, int crop, int row, float* out,
                     std::size_t out_stride) const;
  void convolve_int8(Workspace& at, const Convolution& layer, int k, int channels, int pixels, int crops, Maps out,
                     Maps residual, Activation activation) const;

  EncoderOptions options_;
  const Int8Kernels* int8_;  // null in FP32
  const EncoderKernels* kernels_;
  EncoderNetwork network_;
  std::size_t first_late_;  // bottlenecks from here on run for several crops together
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
  mutable std::size_t workspaces_ = 0;  // idle and lent
};

}  // namespace singerembed
