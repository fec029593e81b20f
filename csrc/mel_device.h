// The mel front end on a GPU: structs exchanged with the host, kernel arguments, and the interface of the CUDA
// implementation and its emulation. Includes neither CUDA nor Python headers.
//
// A batch takes three launches, because the host selects the loud crops after the first:
//
//   level      one block per crop: peak, RMS, silence. The host reads the levels and lists the loud crops, which may be
//              anywhere in device memory.
//   mel        one block per kFramesPerBlock frames of a listed crop: log-mel to scratch, and the block's maximum.
//   normalise  divides by the maximum over the crop's blocks (or by a constant), and casts.
//
// Where a separator on the device gave a voice in several channels, one more comes first:
//
//   voice      one block per stretch in which one decision is made on how to mix down to mono.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mel.h"

namespace singerembed {

struct DeviceLevel {  // output of `level` for a crop
  float peak, rms;    // as in CropLevel
  float scale;        // factor on samples: 1 / peak in the unit of the samples; 0 unless loud
  std::int32_t state; // CropState
};

struct DeviceCrop {        // input of `mel` for a crop
  std::uint64_t pcm;       // address in device memory, aligned to a pair of samples
  float scale;             // from its DeviceLevel
  std::int32_t is_int16;   // samples are int16, otherwise float
};
static_assert(sizeof(DeviceLevel) == 16 && sizeof(DeviceCrop) == 16, "singerembed/model/mel.py has the same layout");

// The mel basis by segments: segment s lies between the edges s and s + 1 of the bands, so that band s rises over it
// and band s - 1 falls. It is read once for both. Slices of up to 32 segments, one per lane of a warp, are padded to
// their longest one (sliced ELLPACK), so that a warp's reads of weights are coalesced and its lanes do not diverge. The
// next slice begins with the last segment of the one before, whose bands thus need no other slice.
struct alignas(16) MelSlice {
  int first_band, n_bands;  // at most 31 bands; lane l has segment first_band + l
  int n_bins;               // a multiple of kBinsPerStep (mel_kernels.h), some of the bins with weights of 0
  int first_weight;         // weights[first_weight + 32 * i + lane] is for bins 2 i and 2 i + 1 of the lane's segment
};

struct alignas(16) Quad {  // a single load on a GPU
  float a, b, c, d;
};

struct SlicedBasis {
  std::vector<MelSlice> slices;
  std::vector<int> first_slices;  // of each warp of a block, and their number
  std::vector<int> first_bins;    // of each lane of each slice
  std::vector<Quad> weights;      // rising, falling, rising, falling
};

SlicedBasis slice_basis(const MelTables& tables);

// Constants of the transform (mel_transform.h), [24, 32], of each lane 8 quads for the window, 8 for the turns of a
// row's butterflies in the order of the stages, and 8 for the turns of the split.
std::vector<Quad> make_transform_table();

struct LevelJob {
  int crop_samples;
  float silence_peak;
  const void* pcm;      // [crops, crop_samples]
  DeviceLevel* levels;  // [crops]
};

struct MelTablePointers {  // into device memory
  const Quad* transform;
  const MelSlice* slices;
  const int *first_slices, *first_bins;
  const Quad* weights;
};

struct MelJob {
  int crop_samples, n_mels, n_frames;
  float log_offset;
  bool power_only;  // stop before the logarithm
  MelTablePointers tables;
  const DeviceCrop* crops;
  float* mel;               // [crops, n_frames, n_mels]
  float* maxima;            // [crops, blocks of a crop, warps of a block]
};

struct NormaliseJob {
  int n_mels, n_frames;
  int maxima_per_crop;
  float log_divisor;
  bool power_only;
  const float* mel;
  const float* maxima;
  void* out;  // [crops, n_mels, n_frames]: float, or the bits of IEEE half
};

struct VoiceJob {
  const float* voice;  // in device memory, [channels] with `stride` samples from one to the next
  int channels;        // 1 or 2
  int stride;
  int first;           // sample of the voice at which the crop begins
  int samples;         // of the crop that are there; the others become 0
  int crop_samples;
  int segment;         // samples in which one decision is made, see mix_down
  float* mono;         // [crop_samples]
  float* energies;     // sums of squares over all channels, [segments() of the crop]

  int segments() const { return (crop_samples + segment - 1) / segment; }
};

enum class DeviceOutput { kFloat, kHalf };

// Base class of the CUDA implementation and its emulation. Addresses are device addresses; a stream is a cudaStream_t
// as a number. Calls are asynchronous and allocate nothing. Not thread-safe.
class DeviceMel {
 public:
  virtual ~DeviceMel() = default;
  DeviceMel(const DeviceMel&) = delete;
  DeviceMel& operator=(const DeviceMel&) = delete;

  const MelOptions& options() const { return options_; }

  // Bytes that `mel` needs as scratch for a batch of `crops`.
  std::size_t scratch_bytes(int crops) const;

  // Measures `crops` consecutive crops at `pcm` and writes their DeviceLevel to `levels`.
  // Throws std::invalid_argument for an empty batch, more than kMaxBatch crops, or a misaligned address.
  void level(std::uint64_t pcm, bool is_int16, int crops, std::uint64_t levels, std::uint64_t stream);

  // Writes the spectrograms of `crops` loud crops, listed as DeviceCrop at `list`, to `out`, [crops, n_mels, n_frames].
  // `scratch` has scratch_bytes(crops). Throws as `level`.
  void mel(std::uint64_t list, int crops, std::uint64_t scratch, std::uint64_t out, DeviceOutput type, MelOutput what,
           std::uint64_t stream);

  static constexpr int kMaxBatch = 65535;  // crops: the second dimension of a grid

 protected:
  // Throws std::invalid_argument for options out of range, or an odd crop_samples: samples are read in pairs.
  explicit DeviceMel(const MelOptions& options);

 private:
  virtual void launch(const LevelJob& job, bool is_int16, int crops, std::uint64_t stream) = 0;
  // `job` comes without tables; the implementation adds them.
  virtual void launch(MelJob job, int blocks, int crops, std::uint64_t stream) = 0;
  virtual void launch(const NormaliseJob& job, DeviceOutput type, int crops, std::uint64_t stream) = 0;

  MelOptions options_;
};

// Enqueues the kernel `voice` in the current CUDA context. Throws std::invalid_argument for sizes out of range, and
// std::runtime_error if CUDA fails.
void mix_voice(const VoiceJob& job, std::uint64_t stream);

// The same, emulated on the host as EmulatedMel.
void emulate_mix_voice(const VoiceJob& job, std::uint32_t order);

// Throws std::invalid_argument for sizes out of range.
void check_voice(const VoiceJob& job);

// The tables are allocated in the current CUDA context, which must be current in all calls and in the destructor.
// Throws std::runtime_error if CUDA fails.
std::unique_ptr<DeviceMel> make_cuda_mel(const MelOptions& options);

// Emulation of the kernels on the host, thread by thread, in host memory; `stream` is ignored. `order` of the threads
// within a stage: 0 ascending, 1 descending, else the seed of a shuffle. Accesses to shared memory are checked:
// std::logic_error for a race (two threads access a word without a barrier in between, one of them writing) and for
// reading an uninitialised word.
class EmulatedMel : public DeviceMel {
 public:
  struct Traffic {
    std::string stage;
    std::uint64_t wavefronts;  // passes over the 32 banks of shared memory for the accesses of a warp
    std::uint64_t ideal;       // the same without bank conflicts
  };

  EmulatedMel(const MelOptions& options, std::uint32_t order);
  ~EmulatedMel() override;
  std::vector<Traffic> traffic() const;  // since construction, one per stage of the mel kernel that has any

 private:
  void launch(const LevelJob& job, bool is_int16, int crops, std::uint64_t stream) override;
  void launch(MelJob job, int blocks, int crops, std::uint64_t stream) override;
  void launch(const NormaliseJob& job, DeviceOutput type, int crops, std::uint64_t stream) override;

  struct State;
  std::unique_ptr<State> state_;
};

// Runs a stage without a barrier, to test the race detection of EmulatedMel. Throws std::logic_error.
void emulate_missing_barrier();

}  // namespace singerembed
