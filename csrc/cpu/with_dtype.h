// A call's storage dtype as a type (kernels only).
#pragma once

#include "common/dtype.h"
#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// Calls f with an element of the dtype, whose type alone counts; float64 is not among them.
template <typename F>
BTI_FAST_INLINE void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float16: return f(Half{});
    case Dtype::bfloat16: return f(BFloat16{});
    default: return f(float{});
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
