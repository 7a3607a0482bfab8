// What the operators ask of a device: the current stream, a guard, launches. The only file that calls the CUDA runtime.
#ifndef VPT_CUDA_DEVICE_H
#define VPT_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <string>

#include "../stable.h"

#define VPT_DEVICE_KEY CUDA

namespace vpt::cuda {

// The device of a call, current while this lives, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Starts `blocks` blocks. A chained kernel calls wait_for_kernel_before() and may start while the one before it in
  // the stream, which must be this call's, still runs (programmatic dependent launch; sm_90 and later).
  template <typename Params>
  void launch(
      void (*kernel)(Params), int64_t blocks, int threads, size_t shared, const Params& params,
      bool chained = false) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "a launch of ", blocks, " blocks; the limit is 2^31 - 1: split the call");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = chained && overlaps(index_) ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
  }

 private:
  // Whether the device has programmatic dependent launch.
  static bool overlaps(int32_t index) {
    constexpr int kDevices = 64;
    static std::atomic<int> major[kDevices];
    if (index < 0 || index >= kDevices) return false;
    int known = major[index].load(std::memory_order_relaxed);
    if (known == 0) {
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&known, cudaDevAttrComputeCapabilityMajor, index));
      major[index].store(known, std::memory_order_relaxed);
    }
    return known >= 9;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace vpt::cuda

#endif
