// cross_attention's kernels for float16.
#include "cuda/cross_attention_launch.cuh"

template struct bti_fast::CrossLauncher<bti_fast::Dtype::float16>;
