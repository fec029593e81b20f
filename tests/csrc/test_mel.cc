// Runs the mel kernels over extremes under AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set, lengths
// on both sides of every edge, and samples that a damaged file may hold. Prints one line; a finding ends it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "mel.h"
#include "require.h"

using namespace singerembed;

namespace {

MelOptions options_for(int crop_samples, float divisor) {
  return {crop_samples, 128, 22050, 0, 11025, 1e-8f, divisor, 1e-3f};
}

// Exactly as long as the crop, so that one sample too many is a finding.
template <class Sample>
void run(const MelPlan& plan, const std::vector<Sample>& pcm, CropState expected, const std::string& what) {
  std::unique_ptr<Sample[]> exact(new Sample[pcm.size()]);
  std::copy(pcm.begin(), pcm.end(), exact.get());
  for (const MelOutput output : {MelOutput::kPower, MelOutput::kLog}) {
    std::unique_ptr<float[]> mel(new float[plan.options().mel_size()]);
    const CropLevel level = plan.run(exact.get(), output, mel.get());
    require(level.state == expected, what + ": state on " + plan.isa());
    if (level.state != CropState::kLoud) continue;
    for (std::size_t i = 0; i < plan.options().mel_size(); ++i) {
      require(std::isfinite(mel[i]), what + ": a finite spectrogram on " + plan.isa());
    }
  }
}

void floats(const MelPlan& plan, std::mt19937& random) {
  const auto n = static_cast<std::size_t>(plan.options().crop_samples);
  std::uniform_int_distribution<std::uint32_t> any_bits;
  std::uniform_int_distribution<std::size_t> anywhere(0, n - 1);
  std::vector<float> pcm(n);
  for (int round = 0; round < 4; ++round) {
    bool finite = true;
    float peak = 0;
    for (float& x : pcm) {  // any bit pattern: NaN, infinities, subnormals, both zeros
      std::uint32_t bits = any_bits(random);
      if (round < 3) bits = (bits & 0x807fffffu) | ((round == 0 ? 1u : round == 1 ? 100u : 254u) << 23);
      std::memcpy(&x, &bits, sizeof x);
      finite &= std::isfinite(x);
      peak = std::max(peak, std::abs(x));
    }
    const CropState expected = !finite ? CropState::kInvalid : peak > 1e-3f ? CropState::kLoud : CropState::kSilent;
    run(plan, pcm, expected, "random bits");
  }
  pcm.assign(n, 0.0f);
  run(plan, pcm, CropState::kSilent, "zeros");
  pcm[anywhere(random)] = -1.0f;
  run(plan, pcm, CropState::kLoud, "one sample");
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const std::size_t at : {std::size_t{0}, n - 1, anywhere(random)}) {
      std::vector<float> spoilt(n, 0.5f);
      spoilt[at] = bad;
      run(plan, spoilt, CropState::kInvalid, "one bad sample");
    }
  }
  run(plan, std::vector<float>(n, std::numeric_limits<float>::max()), CropState::kLoud, "largest floats");
  run(plan, std::vector<float>(n, std::numeric_limits<float>::denorm_min()), CropState::kSilent, "subnormals");
}

void int16s(const MelPlan& plan, std::mt19937& random) {
  std::uniform_int_distribution<int> any(-32768, 32767);
  std::vector<std::int16_t> pcm(static_cast<std::size_t>(plan.options().crop_samples));
  for (auto& x : pcm) x = static_cast<std::int16_t>(any(random));
  run(plan, pcm, CropState::kLoud, "random int16");
  pcm.assign(pcm.size(), -32768);
  run(plan, pcm, CropState::kLoud, "lowest int16");
  pcm.assign(pcm.size(), 1);
  run(plan, pcm, CropState::kSilent, "one step of int16");
}

void mixing(std::mt19937& random) {
  std::uniform_int_distribution<int> sizes(0, 1000), channel_counts(1, 64);
  for (int round = 0; round < 200; ++round) {
    const auto frames = static_cast<std::size_t>(sizes(random));
    const int channels = channel_counts(random);
    std::vector<float> in(frames * static_cast<std::size_t>(channels), 0.25f), out(frames);
    const auto segment = static_cast<std::size_t>(1 + sizes(random));
    require(mix_down(in.data(), frames, channels, segment, out.data()) == 0, "equal channels do not cancel");
    for (const float x : out) require(x == 0.25f, "mean of equal channels");
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const char* isa : available_isas()) {
    for (const int n : {2048, 2049, 2559, 2560, 2561, 4096, 8191, 8192, 8193, 12287, 30001, 176400}) {
      for (const float divisor : {0.0f, 9.2f}) {
        const MelPlan plan(options_for(n, divisor), isa);
        floats(plan, random);
        int16s(plan, random);
      }
    }
  }
  mixing(random);
  for (const int n : {0, 1, 2047, -5}) {
    try {
      const MelPlan plan(options_for(n, 0));
      require(false, "a crop shorter than a frame is refused");
    } catch (const std::invalid_argument&) {
      require(true, "");
    }
  }
  std::printf("%d checks on %zu instruction sets\n", checks, available_isas().size());
}
