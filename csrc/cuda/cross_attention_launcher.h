// Plans and launches of cross_attention for one storage dtype; each is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"
#include "cuda/cross_attention.h"

namespace bti_fast {

// Floats of memory that a call needs.
struct CrossPlan {
  int64_t partial, kept;
};

template <Dtype dtype>
struct CrossLauncher {
  // Cuts the call into splits for the current device.
  static CrossPlan plan(CrossForward& job);
  static CrossPlan plan(CrossBackward& job);
  // To be called with the plan's splits, once its memory is there.
  static void run(const CrossForward& job, cudaStream_t stream);
  static void run(const CrossBackward& job, cudaStream_t stream);
};

}  // namespace bti_fast
