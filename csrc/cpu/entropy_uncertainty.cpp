#include "cpu/entropy_uncertainty.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/checks.h"
#include "common/positions_of.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

// Work below this many logits per thread is not worth handing out.
constexpr int64_t kLogitsPerTask = 1 << 14;

int64_t grain(int64_t classes) { return std::max<int64_t>(64, kLogitsPerTask / std::max<int64_t>(1, classes)); }

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 2, "logits must have at least 2 axes (batch, class), got ", logits.dim());
  STD_TORCH_CHECK(logits.size(1) >= 1, "logits must have at least 1 class, got 0");
}

}  // namespace

Tensor entropy_uncertainty(const Tensor& logits) {
  check_logits(logits);
  const Dtype dtype = dtype_of(logits, "logits");
  std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end());
  shape.erase(shape.begin() + 1);
  Tensor u = torch::stable::empty(shape, accumulation_type(dtype), std::nullopt, logits.device());
  if (u.numel() == 0) return u;
  const EntropyForward job{logits.const_data_ptr(), u.mutable_data_ptr(), dtype, logits.size(1), logits.stride(1),
                           positions_of<2>({&logits, &u}, {true, false})};
  const auto kernel = BTI_FAST_SELECT(entropy_forward);
  torch::stable::parallel_for(0, job.at.count, grain(job.classes),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return u;
}

Tensor entropy_uncertainty_backward(const Tensor& grad_u, const Tensor& logits) {
  check_logits(logits);
  const Dtype dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(grad_u.scalar_type() == accumulation_type(dtype), "grad_u must be ",
                  torch::headeronly::toString(accumulation_type(dtype)), ", got ",
                  torch::headeronly::toString(grad_u.scalar_type()));
  bool same = grad_u.dim() == logits.dim() - 1;
  for (int64_t d = 0; same && d < grad_u.dim(); ++d) same = grad_u.size(d) == logits.size(d == 0 ? 0 : d + 1);
  STD_TORCH_CHECK(same, "grad_u must have the shape of logits without its class axis");
  Tensor grad = torch::stable::empty_like(logits);
  if (grad.numel() == 0) return grad;
  const EntropyBackward job{grad_u.const_data_ptr(), logits.const_data_ptr(), grad.mutable_data_ptr(), dtype,
                            logits.size(1), logits.stride(1), grad.stride(1),
                            positions_of<3>({&logits, &grad_u, &grad}, {true, false, true})};
  const auto kernel = BTI_FAST_SELECT(entropy_backward);
  torch::stable::parallel_for(0, job.at.count, grain(job.classes),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return grad;
}

}  // namespace bti_fast
