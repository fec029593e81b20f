// RAII owners of CUDA resources, and error checks. All CUDA allocation and destruction is in this file.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace singerembed {

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear a non-sticky error, which the next call would report again
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status) + " (" + file + ":" + std::to_string(line) + ")");
}

#define SE_CUDA(call) ::singerembed::check_cuda((call), #call, __FILE__, __LINE__)

// Device memory with a copy of a host vector. Move-only.
template <class T>
class DeviceTable {
 public:
  explicit DeviceTable(const std::vector<T>& values) {
    SE_CUDA(cudaMalloc(&data_, values.size() * sizeof(T)));
    const cudaError_t status = cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
    if (status != cudaSuccess) cudaFree(data_);  // the destructor does not run if the constructor throws
    SE_CUDA(status);
  }
  DeviceTable(DeviceTable&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceTable& operator=(DeviceTable&&) = delete;
  ~DeviceTable() { cudaFree(data_); }  // ignores errors: a destructor cannot throw, and a failed context was reported
  const T* data() const noexcept { return data_; }

 private:
  T* data_ = nullptr;
};

// A CUDA graph captured from a stream between the constructor and `finish`. Move-only.
class CapturedGraph {
 public:
  explicit CapturedGraph(cudaStream_t stream) : stream_(stream) {
    SE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  }
  CapturedGraph(CapturedGraph&& other) noexcept
      : stream_(std::exchange(other.stream_, nullptr)), graph_(std::exchange(other.graph_, nullptr)),
        executable_(std::exchange(other.executable_, nullptr)) {}
  CapturedGraph& operator=(CapturedGraph&&) = delete;
  ~CapturedGraph() {
    abandon();
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  void finish() {
    SE_CUDA(cudaStreamEndCapture(std::exchange(stream_, nullptr), &graph_));
    SE_CUDA(cudaGraphInstantiate(&executable_, graph_, 0));
  }

  // Ends the capture without a graph.
  void abandon() noexcept {
    if (stream_ == nullptr) return;
    cudaStreamEndCapture(std::exchange(stream_, nullptr), &graph_);
    cudaGetLastError();
  }

  void launch(cudaStream_t stream) const { SE_CUDA(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaStream_t stream_;  // null after the capture
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace singerembed
