// Interface of the mel front end: formulas, options, shapes. Includes neither CUDA nor Python headers.
//
// For one crop x[0 .. crop_samples) of PCM:
//
//   peak = max |x|, rms = sqrt(mean x^2)                       (full scale is 1; int16 is divided by 32768)
//   A crop whose peak does not exceed the silence threshold is silent, one with NaN or infinity is invalid. Neither
//   gets a spectrogram. All other crops are loud, and get one:
//   y        = x / peak, reflected at both ends by kFftSize / 2 samples
//   power    = |DFT(hann * y[f * kHopSamples ...])|^2           f = 0 .. n_frames - 1
//   mel      = basis * power                                    basis: Slaney scale and area norm
//   log_mel  = log(mel + log_offset) / divisor                  divisor: the crop's own maximum, or a constant
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace singerembed {

// FFT size and hop are constants: the FFT is written for them, and all published weights were trained with them.
inline constexpr int kFftSize = 2048;
inline constexpr int kHopSamples = 512;
inline constexpr int kBins = kFftSize / 2 + 1;

struct MelOptions {
  int crop_samples = 0;         // samples in a crop, at least kFftSize
  int n_mels = 0;               // mel bands
  double mel_sample_rate = 0;   // Hz, of the mel basis; may differ from that of the audio
  double mel_fmin = 0;          // Hz, lower edge of the first band
  double mel_fmax = 0;          // Hz, upper edge of the last band, at most mel_sample_rate / 2
  float log_offset = 0;         // added to the mel power before the logarithm
  float log_divisor = 0;        // 0: divide by the crop's own maximum; otherwise by this constant
  float silence_peak = 0;       // full scale is 1; a crop whose peak is not above this is silent

  int n_frames() const { return 1 + crop_samples / kHopSamples; }
  std::size_t mel_size() const { return static_cast<std::size_t>(n_mels) * static_cast<std::size_t>(n_frames()); }
};

// A mel band as a range of FFT bins. At most two of the n_mels weights of a bin are not zero; only those are stored.
struct MelBand {
  int first_bin;     // weights[first_weight + i] multiplies power[first_bin + i], i = 0 .. n_bins - 1
  int n_bins;
  int first_weight;
};

// Constant tables of the CPU and CUDA kernels. Computed in double, stored in float.
struct MelTables {
  std::vector<float> window;          // kFftSize: periodic Hann, halved (the real split adds two terms of each bin)
  std::vector<float> fft_twiddles;    // 2 * kFftSize / 2: (cos, -sin)(2 pi j / (kFftSize / 2)), j = n2 * 32 + k1 -> n2 * k1
  std::vector<float> split_twiddles;  // 2 * kFftSize / 2: (cos, -sin)(2 pi k / kFftSize)
  std::vector<MelBand> bands;         // n_mels
  std::vector<float> weights;         // of all bands, one after another, in 1/Hz
};

// Throws std::invalid_argument naming the option that is out of range.
MelTables make_tables(const MelOptions& options);

struct IsaKernels;  // kernels for one instruction set

enum class CropState : std::uint8_t { kLoud = 0, kSilent = 1, kInvalid = 2 };

struct CropLevel {
  float peak;  // full scale is 1; NaN in an invalid crop
  float rms;
  CropState state;
};

enum class MelOutput { kPower, kLog };  // mel, or log_mel, of the formulas above

// The CPU implementation, for one crop at a time. Immutable after construction, so thread-safe.
class MelPlan {
 public:
  // `isa` is one of available_isas(), or empty for the widest that this processor supports.
  // Throws std::invalid_argument for options out of range or an ISA that this processor or build does not support.
  explicit MelPlan(const MelOptions& options, const char* isa = "");

  const MelOptions& options() const { return options_; }
  const MelTables& tables() const { return tables_; }
  const char* isa() const;

  // `pcm` holds options().crop_samples samples. `mel` has room for options().mel_size() floats, [n_mels, n_frames],
  // and is written only if the crop is loud. Throws std::bad_alloc if the thread's scratch cannot be allocated.
  CropLevel run(const std::int16_t* pcm, MelOutput output, float* mel) const;
  CropLevel run(const float* pcm, MelOutput output, float* mel) const;

 private:
  template <class Sample>
  CropLevel run_any(const Sample* pcm, MelOutput output, float* mel) const;

  MelOptions options_;
  MelTables tables_;
  const IsaKernels* kernels_;
};

std::vector<const char*> available_isas();  // narrowest first

// Mean over interleaved channels: out[i] = (in[i * channels] + ...) / channels, summed in float as NumPy does.
//
// In segments of `segment` frames in which the channels cancel, out is the loudest channel instead: if the energy of the
// mean is below 1 % of what it would be with only the second loudest channel. Returns the number of those segments.
std::size_t mix_down(const float* interleaved, std::size_t frames, int channels, std::size_t segment, float* mono);

}  // namespace singerembed
