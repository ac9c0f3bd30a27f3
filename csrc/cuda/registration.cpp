// Every operator of the CUDA library, namespace bti_fast_cuda. The public schemas, autograd and fakes are in Python
// (bti_fast.ops); these are the implementations that it calls.
#include <torch/csrc/stable/library.h>

#include "cuda/operators.h"

STABLE_TORCH_LIBRARY(bti_fast_cuda, m) {
  m.def("entropy_uncertainty(Tensor logits) -> Tensor");
  m.def("entropy_uncertainty_backward(Tensor grad_u, Tensor logits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bti_fast_cuda, CUDA, m) {
  m.impl("entropy_uncertainty", TORCH_BOX(&bti_fast::entropy_uncertainty_cuda));
  m.impl("entropy_uncertainty_backward", TORCH_BOX(&bti_fast::entropy_uncertainty_backward_cuda));
}
