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

void sizes(const Floats& weights, int n_mels, int n_frames, bool int8, std::mt19937& random) {
  const std::string what = std::to_string(n_mels) + " x " + std::to_string(n_frames) + (int8 ? ", int8" : "");
  std::normal_distribution<float> normal(-0.5f, 0.5f);
  std::vector<Floats> crops(6, Floats(static_cast<std::size_t>(n_mels) * n_frames));
  for (Floats& crop : crops) {
    for (float& x : crop) x = normal(random);
  }
  Floats reference;
  for (const char* isa : {"portable", "avx2", "avx512", ""}) {
    if (!int8 && !*isa) continue;  // the widest in 8 bits has no FP32 kernels of its own
    std::unique_ptr<Encoder> encoder;
    try {
      const EncoderOptions options{n_mels, n_frames, kDim, int8};
      encoder = std::make_unique<Encoder>(options, weights.data(), weights.size(), isa);
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
    // Activations that fall between two levels are rounded up or down.
    require(difference <= (int8 ? 2e-2f : 1e-4f) * largest, what + ": instruction sets agree on " + isa);
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

// Any numbers, and the largest sums that there are, by the kernels and by the definition; arrays are exactly as long as
// they need to be.
void int8_sums(const Int8Kernels& kernels, int k, int pixels, bool extreme, std::mt19937& random) {
  if (!kernels.supported()) return;
  const std::string what = std::string(kernels.name) + ", " + std::to_string(k) + " channels";
  std::uniform_int_distribution<int> activation(0, 255), weight(-127, 127), zero_point(0, 255);
  const int blocks = kernels.panel_blocks, out = blocks * kBlock, in_blocks = blocks_of(k), zero = zero_point(random);
  const std::size_t in_bytes = kernels.activation_bytes, weight_bytes = 4 / kernels.group;
  std::vector<int> x(static_cast<std::size_t>(in_blocks) * pixels * kBlock), w(static_cast<std::size_t>(k) * out);
  for (int& q : x) q = extreme ? 255 : activation(random);
  for (int& v : w) v = extreme ? (&v - w.data()) % 2 ? -127 : 127 : weight(random);
  const auto narrow = [](std::vector<unsigned char>& bytes, std::size_t at, int value, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) bytes[at * size + i] = static_cast<unsigned char>(value >> (8 * i));
  };
  std::vector<unsigned char> in(x.size() * in_bytes), packed(w.size() * weight_bytes);
  for (std::size_t i = 0; i < x.size(); ++i) narrow(in, i, x[i], in_bytes);
  std::vector<std::int32_t> sums(out);
  for (int c = 0; c < k; ++c) {
    for (int n = 0; n < out; ++n) {
      const int g = kernels.group;
      narrow(packed, (static_cast<std::size_t>(c / g) * out + n) * g + c % g, w[c * out + n], weight_bytes);
      sums[n] += w[c * out + n];
    }
  }
  const Floats scale(out, 1.0f), bias(out, 0.0f);
  Floats results(static_cast<std::size_t>(blocks) * pixels * kBlock);
  Int8Job job{};
  job.in = in.data();
  job.in_stride = job.out_stride = static_cast<std::size_t>(pixels) * kBlock;
  job.k = k;
  job.weights = packed.data();
  job.weight_sums = sums.data();
  job.scale = scale.data();
  job.bias = bias.data();
  job.step = 1;
  job.zero = zero;
  job.out = results.data();
  job.blocks = blocks;
  job.pixels = pixels;
  job.activation = Activation::kNone;
  kernels.pointwise(job);
  bool equal = true;
  for (int n = 0; n < out; ++n) {
    for (int p = 0; p < pixels; ++p) {
      int sum = 0;
      for (int c = 0; c < k; ++c) {
        sum += w[c * out + n] * (x[(static_cast<std::size_t>(c / kBlock) * pixels + p) * kBlock + c % kBlock] - zero);
      }
      const std::size_t at = (static_cast<std::size_t>(n / kBlock) * pixels + p) * kBlock + n % kBlock;
      equal = equal && results[at] == static_cast<float>(sum);
    }
  }
  require(equal, what + ": exact sums");
}

// Values between two levels, beyond the range, and none at all, by each instruction set.
void int8_rounding(const Int8Kernels& kernels) {
  if (!kernels.supported()) return;
  const float nan = std::nanf("");
  const Floats map{0, 0.49f, 0.51f, 1.5f, 2.5f, 255, 300, 1e30f, -0.49f, -1, -300, -1e30f, nan, 7, 8, 9}, ones(kBlock, 1);
  const int expected[kBlock] = {3, 3, 4, 4, 6, 255, 255, 255, 3, 2, 0, 0, 0, 10, 11, 12};  // halves to even numbers
  std::vector<unsigned char> out(kBlock * kernels.activation_bytes);
  kernels.quantise(map.data(), ones.data(), 0, 1, 1, 1.0f, 3, out.data());
  for (int i = 0; i < kBlock; ++i) {
    require(out[i * kernels.activation_bytes] == expected[i], std::string(kernels.name) + ": level " + std::to_string(i));
  }
  const Floats finite{-3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5}, twos(kBlock, 2);
  const MapRange range = kernels.range(finite.data(), twos.data(), 0, 1, 1);
  require(range.low == -6 && range.high == 10 && range.sum == 8, std::string(kernels.name) + ": a range");
  require(std::isnan(kernels.range(map.data(), ones.data(), 0, 1, 1).sum), "a map with NaN says so");
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const Floats weights = make_weights(random);
  refusals(weights);
  const int shapes[][2] = {{128, 345}, {32, 32}, {33, 47}, {64, 62}, {40, 131}};
  for (const auto& shape : shapes) {
    sizes(weights, shape[0], shape[1], false, random);
    if (shape[0] < 64) sizes(weights, shape[0], shape[1], true, random);
  }
#ifdef SE_X86
  const Int8Kernels* const all[] = {&kPortableInt8, &kAvx2Int8, &kAvx512Int8, &kVnniInt8};
#else
  const Int8Kernels* const all[] = {&kPortableInt8};
#endif
  for (const Int8Kernels* kernels : all) {
    for (const int pixels : {1, 5, 29}) {
      for (const int k : {16, 24, 40, 1152}) int8_sums(*kernels, k, pixels, false, random);
      int8_sums(*kernels, 1152, pixels, true, random);
    }
    int8_rounding(*kernels);
  }
  std::printf("%d checks on the encoder\n", checks);
  return 0;
}
