#include <cmath>
#include <stdexcept>
#include <string>

#include "mel.h"

namespace singerembed {
namespace {

constexpr double kPi = 3.14159265358979323846;

// Slaney's mel scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998; what librosa and nnAudio
// call htk=False).
constexpr double kLinearStep = 200.0 / 3.0;  // Hz per mel below 1 kHz
constexpr double kBreakHz = 1000.0;
constexpr double kBreakMel = kBreakHz / kLinearStep;
const double kLogStep = std::log(6.4) / 27.0;

double hz_to_mel(double hz) {
  return hz < kBreakHz ? hz / kLinearStep : kBreakMel + std::log(hz / kBreakHz) / kLogStep;
}

double mel_to_hz(double mel) {
  return mel < kBreakMel ? mel * kLinearStep : kBreakHz * std::exp(kLogStep * (mel - kBreakMel));
}

void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

void add_mel_bands(const MelOptions& options, MelTables& tables) {
  const double bin_hz = options.mel_sample_rate / kFftSize;
  const double mel_low = hz_to_mel(options.mel_fmin);
  const double mel_step = (hz_to_mel(options.mel_fmax) - mel_low) / (options.n_mels + 1);
  const auto edge_hz = [&](int edge) { return mel_to_hz(mel_low + mel_step * edge); };
  for (int band = 0; band < options.n_mels; ++band) {
    const double low = edge_hz(band), centre = edge_hz(band + 1), high = edge_hz(band + 2);
    MelBand run{0, 0, static_cast<int>(tables.weights.size())};
    for (int bin = 0; bin < kBins; ++bin) {
      const double hz = bin * bin_hz;
      const double triangle = std::min((hz - low) / (centre - low), (high - hz) / (high - centre));
      if (triangle <= 0) continue;
      if (run.n_bins == 0) run.first_bin = bin;
      ++run.n_bins;
      tables.weights.push_back(static_cast<float>(triangle * 2.0 / (high - low)));
    }
    tables.bands.push_back(run);
  }
}

}  // namespace

MelTables make_tables(const MelOptions& options) {
  check(options.crop_samples >= kFftSize, "crop_samples must be at least 2048, the FFT's size");
  check(options.crop_samples <= (1 << 28), "crop_samples must be at most 2^28");
  check(options.n_mels >= 1 && options.n_mels <= kBins, "n_mels must lie between 1 and 1025");
  check(options.mel_sample_rate > 0, "mel_sample_rate must be positive");
  check(options.mel_fmin >= 0 && options.mel_fmin < options.mel_fmax, "mel_fmin must lie in [0, mel_fmax)");
  check(options.mel_fmax <= options.mel_sample_rate / 2, "mel_fmax must be at most half of mel_sample_rate");
  check(options.log_offset > 0, "log_offset must be positive");
  check(options.log_divisor >= 0, "log_divisor must be positive, or 0 for the crop's own maximum");
  check(options.silence_peak >= 0, "silence_peak must not be negative");

  MelTables tables;
  for (int n = 0; n < kFftSize; ++n) {
    tables.window.push_back(static_cast<float>(0.5 * (0.5 - 0.5 * std::cos(2 * kPi * n / kFftSize))));
  }
  const auto push_turn = [](std::vector<float>& table, int j, int period) {
    table.push_back(static_cast<float>(std::cos(2 * kPi * j / period)));
    table.push_back(static_cast<float>(-std::sin(2 * kPi * j / period)));
  };
  for (int n2 = 0; n2 < 32; ++n2) {
    for (int k1 = 0; k1 < 32; ++k1) push_turn(tables.fft_twiddles, n2 * k1, kFftSize / 2);
  }
  for (int k = 0; k < kFftSize / 2; ++k) push_turn(tables.split_twiddles, k, kFftSize);
  add_mel_bands(options, tables);
  return tables;
}

}  // namespace singerembed
