// A kernel's tasks handed out to the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace bti_fast {

// kernel(job, begin, end) over [0, count), in pieces of at least `grain`.
template <typename Job>
void in_parallel(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t grain) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

}  // namespace bti_fast
