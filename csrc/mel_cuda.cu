// CUDA kernels and launches of the stages in mel_kernels.h, mel_normalise.h and voice_kernel.h.

#include <cstdint>
#include <memory>

#include "cuda_raii.h"
#include "mel_device.h"
#include "mel_kernels.h"
#include "mel_normalise.h"
#include "voice_kernel.h"

namespace singerembed {
namespace {

struct Shared {
  unsigned char* memory;

  template <class T>
  __device__ T load(int index) const {
    return reinterpret_cast<const T*>(memory)[index];
  }

  template <class T>
  __device__ void store(int index, T value) const {
    reinterpret_cast<T*>(memory)[index] = value;
  }
};

template <class T>
struct Registers {
  T of_thread;
  __device__ T& operator[](int) { return of_thread; }
};

struct DeviceExec {
  unsigned char* memory;

  template <class T>
  __device__ Registers<T> registers() const {
    return {};
  }

  template <class Source, class Value, class Take>
  __device__ void shuffle(Source source, Value value, Take take) const {
    const int thread = static_cast<int>(threadIdx.x);
    take(thread, __shfl_sync(0xffffffffu, value(thread), source(thread)));
  }

  template <class Begin, class End, class Body>
  __device__ void for_warp(Begin begin, End end, Body body) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, stop = end(warp);
    SE_NO_UNROLL
    for (int i = begin(warp); i < stop; ++i) body(i);
  }

  template <class F>
  __device__ void stage(const char*, F f) const {
    f(static_cast<int>(threadIdx.x), Shared{memory});
    __syncthreads();
  }

  template <class F>
  __device__ void warp_stage(const char*, F f) const {
    f(static_cast<int>(threadIdx.x), Shared{memory});
    __syncwarp();
  }
};

template <class Sample>
__global__ void __launch_bounds__(kLevelThreads) level_kernel(LevelJob job) {
  __shared__ alignas(16) unsigned char memory[kLevelSharedBytes];
  level_block<Sample>(job, static_cast<int>(blockIdx.x), DeviceExec{memory});
}

// Five blocks a multiprocessor leave 96 registers to a thread, which the transform fits into but for one on 9.0. Fewer
// blocks fit only on 7.5, by shared memory.
__global__ void __launch_bounds__(kMelThreads, 5) mel_kernel(MelJob job) {
  __shared__ alignas(16) unsigned char memory[kMelSharedBytes];
  mel_block(job, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), static_cast<int>(blockIdx.y),
            DeviceExec{memory});
}

template <class Out>
__global__ void __launch_bounds__(kNormaliseThreads) normalise_kernel(NormaliseJob job) {
  __shared__ alignas(16) unsigned char memory[kNormaliseSharedBytes];
  normalise_block<Out>(job, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                       DeviceExec{memory});
}

__global__ void __launch_bounds__(kVoiceThreads) voice_kernel(VoiceJob job) {
  __shared__ alignas(16) unsigned char memory[kVoiceSharedBytes];
  voice_block(job, static_cast<int>(blockIdx.x), DeviceExec{memory});
}

cudaStream_t to_stream(std::uint64_t stream) {
  return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
}

class CudaMel final : public DeviceMel {
 public:
  explicit CudaMel(const MelOptions& options) : CudaMel(options, slice_basis(make_tables(options))) {}

 private:
  CudaMel(const MelOptions& options, const SlicedBasis& basis)
      : DeviceMel(options), transform_(make_transform_table()), slices_(basis.slices),
        first_slices_(basis.first_slices), first_bins_(basis.first_bins), weights_(basis.weights) {}

  void launch(const LevelJob& job, bool is_int16, int crops, std::uint64_t stream) override {
    const auto kernel = is_int16 ? level_kernel<std::int16_t> : level_kernel<float>;
    kernel<<<static_cast<unsigned>(crops), kLevelThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  void launch(MelJob job, int blocks, int crops, std::uint64_t stream) override {
    job.tables = {transform_.data(), slices_.data(), first_slices_.data(), first_bins_.data(), weights_.data()};
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(crops));
    mel_kernel<<<grid, kMelThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  void launch(const NormaliseJob& job, DeviceOutput type, int crops, std::uint64_t stream) override {
    const auto kernel = type == DeviceOutput::kHalf ? normalise_kernel<std::uint16_t> : normalise_kernel<float>;
    const dim3 grid(static_cast<unsigned>((job.n_frames + kTileFrames - 1) / kTileFrames),
                    static_cast<unsigned>((job.n_mels + kTileBands - 1) / kTileBands), static_cast<unsigned>(crops));
    kernel<<<grid, kNormaliseThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  DeviceTable<Quad> transform_;
  DeviceTable<MelSlice> slices_;
  DeviceTable<int> first_slices_, first_bins_;
  DeviceTable<Quad> weights_;
};

// Asks for one kernel, so that a build without code for the device is found at opening, not in the middle of a run.
void require_device_code() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, mel_kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    throw std::runtime_error(
        "this build has no CUDA mel kernels for this GPU. Install singerembed again on this machine, with a CUDA toolkit "
        "that knows it");
  }
  SE_CUDA(status);
}

}  // namespace

void mix_voice(const VoiceJob& job, std::uint64_t stream) {
  check_voice(job);
  voice_kernel<<<static_cast<unsigned>(job.segments()), kVoiceThreads, 0, to_stream(stream)>>>(job);
  SE_CUDA(cudaGetLastError());
}

std::unique_ptr<DeviceMel> make_cuda_mel(const MelOptions& options) {
  require_device_code();
  return std::make_unique<CudaMel>(options);
}

}  // namespace singerembed
