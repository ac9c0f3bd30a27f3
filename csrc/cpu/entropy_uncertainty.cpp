#include "cpu/entropy_uncertainty.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/entropy_uncertainty.h"
#include "common/positions_of.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

// Work below this many logits per thread is not worth handing out.
constexpr int64_t kLogitsPerTask = 1 << 14;

int64_t grain(int64_t classes) { return std::max<int64_t>(64, kLogitsPerTask / classes); }

}  // namespace

Tensor entropy_uncertainty(const Tensor& logits) {
  const Dtype dtype = check_entropy(logits);
  const Tensor u = empty_uncertainty(logits, dtype);
  if (u.numel() == 0) return u;
  const EntropyForward job{logits.const_data_ptr(), u.mutable_data_ptr(), dtype, logits.size(1), logits.stride(1),
                           positions_of<2>({&logits, &u}, {true, false})};
  in_parallel(BTI_FAST_SELECT(entropy_forward), job, job.at.count, grain(job.classes));
  return u;
}

Tensor entropy_uncertainty_backward(const Tensor& grad_u, const Tensor& logits) {
  const Dtype dtype = check_entropy_backward(grad_u, logits);
  const Tensor grad = torch::stable::empty_like(logits);
  if (grad.numel() == 0) return grad;
  const EntropyBackward job{grad_u.const_data_ptr(), logits.const_data_ptr(), grad.mutable_data_ptr(), dtype,
                            logits.size(1), logits.stride(1), grad.stride(1),
                            positions_of<3>({&logits, &grad_u, &grad}, {true, false, true})};
  in_parallel(BTI_FAST_SELECT(entropy_backward), job, job.at.count, grain(job.classes));
  return grad;
}

}  // namespace bti_fast
