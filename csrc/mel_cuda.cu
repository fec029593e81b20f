// CUDA kernels and launches of the stages in mel_kernels.h.

#include <cstdint>
#include <memory>

#include "cuda_raii.h"
#include "mel_device.h"
#include "mel_kernels.h"

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

struct DeviceExec {
  unsigned char* memory;

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

// On 9.0, five blocks a multiprocessor spill 8 bytes a thread and are 1.18 times as fast as the four that fit without a
// bound (docs/gpu.md). Elsewhere that is not measured, and shared memory allows no more than one to three before 10.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define SE_MEL_BOUNDS __launch_bounds__(kMelThreads, 5)
#else
#define SE_MEL_BOUNDS __launch_bounds__(kMelThreads)
#endif
__global__ void SE_MEL_BOUNDS mel_kernel(MelJob job) {
  __shared__ alignas(16) unsigned char memory[kMelSharedBytes];
  mel_block(job, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), static_cast<int>(blockIdx.y),
            DeviceExec{memory});
}

template <class Out>
__global__ void __launch_bounds__(kNormaliseThreads) normalise_kernel(NormaliseJob job) {
  __shared__ alignas(16) unsigned char memory[kNormaliseSharedBytes];
  normalise_block<Out>(job, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), DeviceExec{memory});
}

cudaStream_t to_stream(std::uint64_t stream) {
  return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
}

class CudaMel final : public DeviceMel {
 public:
  explicit CudaMel(const MelOptions& options) : CudaMel(options, make_tables(options)) {}

 private:
  CudaMel(const MelOptions& options, const MelTables& tables) : CudaMel(options, tables, slice_basis(tables)) {}
  CudaMel(const MelOptions& options, const MelTables& tables, const SlicedBasis& basis)
      : DeviceMel(options), window_(tables.window), fft_twiddles_(tables.fft_twiddles),
        split_twiddles_(tables.split_twiddles), slices_(basis.slices), weights_(basis.weights) {}

  void launch(const LevelJob& job, bool is_int16, int crops, std::uint64_t stream) override {
    const auto kernel = is_int16 ? level_kernel<std::int16_t> : level_kernel<float>;
    kernel<<<static_cast<unsigned>(crops), kLevelThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  void launch(MelJob job, int blocks, int crops, std::uint64_t stream) override {
    job.tables = {window_.data(), fft_twiddles_.data(), split_twiddles_.data(), slices_.data(), weights_.data()};
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(crops));
    mel_kernel<<<grid, kMelThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  void launch(const NormaliseJob& job, DeviceOutput type, int crops, std::uint64_t stream) override {
    const auto kernel = type == DeviceOutput::kHalf ? normalise_kernel<std::uint16_t> : normalise_kernel<float>;
    const dim3 grid(static_cast<unsigned>((job.size + kNormaliseChunk - 1) / kNormaliseChunk),
                    static_cast<unsigned>(crops));
    kernel<<<grid, kNormaliseThreads, 0, to_stream(stream)>>>(job);
    SE_CUDA(cudaGetLastError());
  }

  DeviceTable<float> window_, fft_twiddles_, split_twiddles_;
  DeviceTable<MelSlice> slices_;
  DeviceTable<WeightedWord> weights_;
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

std::unique_ptr<DeviceMel> make_cuda_mel(const MelOptions& options) {
  require_device_code();
  return std::make_unique<CudaMel>(options);
}

}  // namespace singerembed
