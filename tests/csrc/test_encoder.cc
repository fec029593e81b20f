// Runs the encoder under AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set, sizes on both sides of
// every edge, several crops together, and the largest and smallest values. Prints one line; a finding ends it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "encoder.h"
#include "require.h"

using namespace singerembed;

namespace {

constexpr int kDim = 37;  // neither a whole block nor a whole panel

// Of layers whose sums keep the variance of their inputs, so that activations stay in range.
std::vector<float> make_weights(std::mt19937& random) {
  std::vector<float> weights;
  const auto add = [&](int out, int in) {
    std::normal_distribution<float> normal(0.0f, 1.5f / std::sqrt(static_cast<float>(in)));
    for (int i = 0; i < out * in; ++i) weights.push_back(normal(random));
    for (int i = 0; i < out; ++i) weights.push_back(0.1f * normal(random));
  };
  add(32, 9);
  weights.insert(weights.end(), 8 * 32, 0.05f);  // a bias for each of nine positions
  struct Stage {
    int expansion, taps, in, out, n;
  };
  constexpr Stage kStages[] = {{1, 9, 32, 16, 1},    {6, 9, 16, 24, 2},     {6, 25, 24, 40, 2}, {6, 9, 40, 80, 3},
                               {6, 25, 80, 112, 3}, {6, 25, 112, 192, 4}, {6, 9, 192, 320, 1}};
  for (const Stage& s : kStages) {
    for (int i = 0; i < s.n; ++i) {
      const int in = i == 0 ? s.in : s.out, expanded = in * s.expansion;
      if (s.expansion > 1) add(expanded, in);
      add(expanded, s.taps);
      add(in / 4, expanded);
      add(expanded, in / 4);
      add(s.out, expanded);
    }
  }
  add(1280, 320);
  add(kDim, 1280);
  return weights;
}

using Floats = std::vector<float>;

// The embeddings of those crops that `keep` names. Arrays are exactly as long as they need to be.
Floats embed(const Encoder& encoder, const std::vector<Floats>& crops, const std::vector<std::size_t>& keep) {
  std::unique_ptr<float[]> out(new float[keep.size() * kDim]);
  const auto source = [&](std::size_t crop, float* log_mel) {
    if (std::find(keep.begin(), keep.end(), crop) == keep.end()) return false;
    std::copy(crops[crop].begin(), crops[crop].end(), log_mel);
    return true;
  };
  require(encoder.embed(crops.size(), source, out.get()) == keep.size(), "as many embeddings as crops that were kept");
  return Floats(out.get(), out.get() + keep.size() * kDim);
}

void sizes(const Floats& weights, int n_mels, int n_frames, std::mt19937& random) {
  const std::string what = std::to_string(n_mels) + " x " + std::to_string(n_frames);
  std::normal_distribution<float> normal(-0.5f, 0.5f);
  std::vector<Floats> crops(6, Floats(static_cast<std::size_t>(n_mels) * n_frames));
  for (Floats& crop : crops) {
    for (float& x : crop) x = normal(random);
  }
  Floats reference;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    std::unique_ptr<Encoder> encoder;
    try {
      encoder = std::make_unique<Encoder>(EncoderOptions{n_mels, n_frames, kDim}, weights.data(), weights.size(), isa);
    } catch (const std::invalid_argument&) {
      require(isa != std::string("portable"), "the portable kernels are everywhere");
      continue;
    }
    const Floats together = embed(*encoder, crops, {0, 1, 2, 3, 4, 5});
    const Floats some = embed(*encoder, crops, {1, 4});
    require(std::memcmp(&some[0], &together[kDim], 4 * kDim) == 0, what + ": the same bits among others");
    require(std::memcmp(&some[kDim], &together[4 * kDim], 4 * kDim) == 0, what + ": the same bits after others");
    require(embed(*encoder, crops, {}).empty(), "no crops, no embeddings");
    std::unique_ptr<float[]> traced(new float[kDim]);
    std::size_t stages = 0;
    encoder->trace(crops[1].data(), [&](const BottleneckShape&, const float*) { ++stages; }, traced.get());
    require(stages == 16, "sixteen bottlenecks");
    require(std::memcmp(traced.get(), &some[0], 4 * kDim) == 0, what + ": a trace gives the same bits");
    if (reference.empty()) reference = together;
    float largest = 0, difference = 0;
    for (std::size_t i = 0; i < together.size(); ++i) {
      largest = std::max(largest, std::fabs(reference[i]));
      difference = std::max(difference, std::fabs(reference[i] - together[i]));
    }
    require(largest > 1e-3f && std::isfinite(largest), what + ": embeddings that say something");
    require(difference <= 1e-4f * largest, what + ": instruction sets agree on " + isa);
    std::vector<Floats> extremes(2, Floats(crops[0].size(), 1e30f));
    std::fill(extremes[1].begin(), extremes[1].end(), -1e-38f);
    embed(*encoder, extremes, {0, 1});
  }
}

void refusals(const Floats& weights) {
  const auto refused = [](const EncoderOptions& options, const Floats& given, const char* isa) {
    try {
      const Encoder encoder(options, given.data(), given.size(), isa);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  Floats fewer(weights.begin(), weights.end() - 1), more(weights);
  more.push_back(0);
  require(refused({64, 64, kDim}, fewer, ""), "too few weights");
  require(refused({64, 64, kDim}, more, ""), "too many weights");
  require(refused({64, 64, kDim}, {}, ""), "no weights");
  require(refused({31, 64, kDim}, weights, ""), "too few bands");
  require(refused({64, 1 << 20, kDim}, weights, ""), "too many frames");
  require(refused({64, 64, 0}, weights, ""), "no dimensions");
  require(refused({64, 64, kDim}, weights, "neon512"), "an unknown instruction set");
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const Floats weights = make_weights(random);
  refusals(weights);
  const int shapes[][2] = {{128, 345}, {32, 32}, {33, 47}, {64, 62}, {40, 131}};
  for (const auto& shape : shapes) sizes(weights, shape[0], shape[1], random);
  std::printf("%d checks on the encoder\n", checks);
  return 0;
}
