// Checks shared by the CPU and CUDA bindings. The Python side checks first and speaks better; these keep a direct
// call of the registered operator from reading beyond its memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/dtype.h"

namespace bti_fast {

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Accumulation dtype: float32, and float64 for float64.
inline torch::headeronly::ScalarType accumulation_type(Dtype dtype) {
  return dtype == Dtype::float64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
}

}  // namespace bti_fast
