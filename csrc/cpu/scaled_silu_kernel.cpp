// x <- silu(x * scale + shift), the channels being neighbours in memory.
#include "cpu/scaled_silu.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

void plain(float* x, int64_t count) {
  each_vector(count, [&](int64_t i, int n)
                         __attribute__((always_inline)) { store_first(silu(load_first(x + i, n)), x + i, n); });
}

void scaled(const ScaledSilu& job, float* x) {
  each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
    const VecF y = load_first(x + c, n) * load_first(job.scale + c, n) + load_first(job.shift + c, n);
    store_first(silu(y), x + c, n);
  });
}

}  // namespace

void scaled_silu(const ScaledSilu& job, int64_t begin, int64_t end) {
  if (job.scale == nullptr) return plain(job.x + begin * job.channels, (end - begin) * job.channels);
  for (int64_t row = begin; row < end; ++row) scaled(job, job.x + row * job.channels);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
