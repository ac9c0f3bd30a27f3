// The kernels of cross_attention and their launches; included once for each storage dtype.
#pragma once

#include "common/splits.h"
#include "cuda/cross_attention_launcher.h"
#include "cuda/cross_attention_shapes.cuh"
#include "cuda/launch.h"

namespace bti_fast {

constexpr int kCombineThreads = 256;
// A split loads the class tokens and stores its sums once, about as long as three tiles take.
constexpr int64_t kSplitOverhead = 3, kMostSplits = 256;

// Shared: bytes of shared memory with the most class tokens, for those who read the binary.
template <typename Shape, int Shared = Shape::shared(256)>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) cross_forward_kernel(const CrossForward job) {
  extern __shared__ __align__(16) unsigned char shared[];
  forward_sweep<Shape>(job, shared);
}
template <typename Shape, int Shared = Shape::shared>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) cross_backward_kernel(const CrossBackward job) {
  extern __shared__ __align__(16) unsigned char shared[];
  backward_sweep<Shape>(job, shared);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads) cross_forward_combine_kernel(const CrossForward job, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * kCombineThreads;
  for (int64_t i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x; i < count; i += step) forward_combine<T>(job, i);
}
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) cross_backward_combine_kernel(const CrossBackward job, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * kCombineThreads;
  for (int64_t i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x; i < count; i += step) backward_combine<T>(job, i);
}

inline void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "cross_attention: ", cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Splits for a kernel that gets `bytes` of shared memory, so many that the device is full for as short as can be.
template <typename Shape, typename Kernel>
void set_splits(CrossShape& s, Kernel kernel, int bytes) {
  int blocks = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Shape::threads, bytes));
  STD_TORCH_CHECK(blocks > 0, "cross_attention: this device cannot hold a block of ", bytes, " bytes of shared memory");
  const int64_t slots = int64_t{attribute(cudaDevAttrMultiProcessorCount)} * blocks;
  const Splits splits = choose_splits(s.groups, s.n, Shape::tokens, slots, kSplitOverhead, kMostSplits);
  STD_TORCH_CHECK(s.groups * splits.count < (int64_t{1} << 31), "cross_attention: more than 2^31 blocks of threads");
  s.splits = static_cast<int>(splits.count);
  s.split_tokens = static_cast<int>(splits.tokens);
}

inline int shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

template <Dtype> struct StorageOf { using type = float; };
template <> struct StorageOf<Dtype::float16> { using type = Half; };
template <> struct StorageOf<Dtype::bfloat16> { using type = BFloat16; };

template <Dtype dtype>
CrossPlan CrossLauncher<dtype>::plan(CrossForward& job) {
  using T = typename StorageOf<dtype>::type;
  set_vectors(job, is_channel_major(job.q), sizeof(T));
  return with_shape<T>(job, shared_limit(), [&](auto shape) -> CrossPlan {
    using Shape = decltype(shape);
    set_splits<Shape>(job.shape, cross_forward_kernel<Shape>, Shape::shared(job.shape.m));
    job.parts = job.shape.splits * Shape::parts(job.shape.m);
    return {job.shape.groups * job.parts * forward_partial(job.shape),
            kept_size(job.shape, Shape::class_tokens, Shape::kept)};
  });
}

template <Dtype dtype>
CrossPlan CrossLauncher<dtype>::plan(CrossBackward& job) {
  using T = typename StorageOf<dtype>::type;
  set_vectors(job, is_channel_major(job.q), sizeof(T));
  set_column_gain(job, dtype == Dtype::float16);
  return with_shape<T>(job, shared_limit(), [&](auto shape) -> CrossPlan {
    using Shape = decltype(shape);
    set_splits<Shape>(job.shape, cross_backward_kernel<Shape>, Shape::shared);
    return {job.shape.groups * job.shape.splits * backward_partial(job.shape),
            kept_size(job.shape, Shape::class_tokens, Shape::kept)};
  });
}

template <Dtype dtype>
void CrossLauncher<dtype>::run(const CrossForward& job, cudaStream_t stream) {
  using T = typename StorageOf<dtype>::type;
  const CrossShape& s = job.shape;
  with_shape<T>(job, shared_limit(), [&](auto shape) {
    using Shape = decltype(shape);
    const unsigned blocks = static_cast<unsigned>(s.groups * s.splits);
    cross_forward_kernel<Shape><<<blocks, Shape::threads, Shape::shared(s.m), stream>>>(job);
    check_launch();
  });
  const int64_t count = s.groups * s.m * s.e;
  if (count == 0) return;
  cross_forward_combine_kernel<T><<<blocks_for(count, kCombineThreads), kCombineThreads, 0, stream>>>(job, count);
  check_launch();
}

template <Dtype dtype>
void CrossLauncher<dtype>::run(const CrossBackward& job, cudaStream_t stream) {
  using T = typename StorageOf<dtype>::type;
  const CrossShape& s = job.shape;
  with_shape<T>(job, shared_limit(), [&](auto shape) {
    using Shape = decltype(shape);
    const unsigned blocks = static_cast<unsigned>(s.groups * s.splits);
    cross_backward_kernel<Shape><<<blocks, Shape::threads, Shape::shared, stream>>>(job);
    check_launch();
  });
  const int64_t count = s.groups * backward_partial(s);
  if (count == 0) return;
  cross_backward_combine_kernel<T><<<blocks_for(count, kCombineThreads), kCombineThreads, 0, stream>>>(job, count);
  check_launch();
}

}  // namespace bti_fast
