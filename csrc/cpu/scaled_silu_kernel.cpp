// x <- silu(x * scale + shift), the channels being neighbours in memory.
#include "cpu/scaled_silu.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;

void plain(float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_dense(silu(load_dense(x + i)), x + i);
  const int left = static_cast<int>(count - i);
  if (left > 0) store_first(silu(load_first(x + i, left)), x + i, left);
}

void scaled(const ScaledSilu& job, float* x) {
  const auto vector = [&](int64_t c, int n) __attribute__((always_inline)) {
    const VecF y = load_first(x + c, n) * load_first(job.scale + c, n) + load_first(job.shift + c, n);
    store_first(silu(y), x + c, n);
  };
  int64_t c = 0;
  for (; c + kLanes <= job.channels; c += kLanes) vector(c, kLanes);
  if (c < job.channels) vector(c, static_cast<int>(job.channels - c));
}

}  // namespace

void scaled_silu(const ScaledSilu& job, int64_t begin, int64_t end) {
  if (job.scale == nullptr) return plain(job.x + begin * job.channels, (end - begin) * job.channels);
  for (int64_t row = begin; row < end; ++row) scaled(job, job.x + row * job.channels);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
