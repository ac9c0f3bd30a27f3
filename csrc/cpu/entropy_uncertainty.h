// entropy_uncertainty on the CPU: what passes between the binding and its kernels.
#pragma once

#include "common/dtype.h"
#include "common/positions.h"
#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct EntropyForward {
  const void* logits;  // (B, K, *spatial), any strides
  void* u;             // (B, *spatial), accumulation dtype
  Dtype dtype;         // of logits
  int64_t classes;
  int64_t class_stride;
  Positions<2> at;  // in logits, u
};

struct EntropyBackward {
  const void* grad_u;  // (B, *spatial), accumulation dtype, any strides
  const void* logits;  // (B, K, *spatial), any strides
  void* grad_logits;   // like logits
  Dtype dtype;
  int64_t classes;
  int64_t class_stride, grad_class_stride;
  Positions<3> at;  // in logits, grad_u, grad_logits
};

// Positions [begin, end); each is computed alone, so any division among threads gives the same bits.
BTI_FAST_KERNEL(void, entropy_forward, (const EntropyForward& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, entropy_backward, (const EntropyBackward& job, int64_t begin, int64_t end))

}  // namespace bti_fast
