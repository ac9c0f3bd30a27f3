// Device guard, current stream, launch check and index width: the same for every CUDA operator.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace bti_fast {

using torch::stable::Tensor;

// Makes the tensor's device current for its lifetime and holds that device's current stream.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Call right after a <<<launch>>>.
inline void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

// Blocks along x for a grid-stride loop: y and z end at 65535, so nothing of the data's size goes there.
inline unsigned blocks_for(int64_t items, int threads) {
  return static_cast<unsigned>(std::min<int64_t>((items + threads - 1) / threads, int64_t{1} << 20));
}

// True where every element offset of the tensor, and one grid stride beyond it, fits in 32 bits.
inline bool fits_32_bits(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return std::max(last, tensor.numel()) < (int64_t{1} << 30);
}

}  // namespace bti_fast
