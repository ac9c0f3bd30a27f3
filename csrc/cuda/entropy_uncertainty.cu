// u = H(softmax(a)) / log K over the class axis; K = 1 is the Bernoulli entropy of sigmoid(a) over log 2.
// One thread takes N neighbouring positions and walks the classes once, the maximum kept online. The sums are those of
// csrc/cpu/entropy_uncertainty_kernel.cpp: d = a - max, rest = sum over all but one maximum of e^d, sum = sum e^d d.
#include "cuda/launch.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "common/entropy_uncertainty.h"
#include "common/positions_of.h"
#include "cuda/operators.h"
#include "cuda/vec.cuh"

namespace bti_fast {

namespace {

constexpr int kThreads = 256;
// Classes whose loads are under way at a time; with more of them some target spills registers.
template <typename T, int N>
constexpr int kClassesAhead = sizeof(T) == 8 ? 1 : N == 8 ? 2 : 4;

struct EntropyArgs {
  const void* logits;   // (B, K, *spatial)
  const void* grad_u;   // (B, *spatial), backward only
  void* out;            // u (B, *spatial), or the gradient of logits
  int64_t classes, class_stride, out_class_stride;
  double norm;          // 1 / log K
  Positions<3> at;      // in logits, grad_u (forward: u), out
};

template <typename S>
struct Online {
  S max, rest, sum;

  __device__ __forceinline__ void start(S x) {
    max = x;
    rest = sum = 0;
  }
  __device__ __forceinline__ void add(S x) {
    const S d = x - max;
    if (d > 0) {
      const S scale = exp(-d);
      sum = scale * (sum - d * (1 + rest));
      rest = scale * (1 + rest);
      max = x;
    } else {  // also for NaN, which stays
      const S e = exp(d);
      rest += e;
      sum += e * d;
    }
  }
  __device__ __forceinline__ S t() const { return -sum / (1 + rest); }
};

template <int N, typename T, typename Index>
__device__ __forceinline__ void read_softmax(const T* a, Index classes, Index class_stride, Online<Compute<T>> (&soft)[N]) {
  Compute<T> x[N];
  load(a, x);
#pragma unroll
  for (int i = 0; i < N; ++i) soft[i].start(x[i]);
#pragma unroll(kClassesAhead<T, N>)
  for (Index k = 1; k < classes; ++k) {
    load(a + k * class_stride, x);
#pragma unroll
    for (int i = 0; i < N; ++i) soft[i].add(x[i]);
  }
}

template <typename T, typename Index, int N, bool Binary>
__global__ void __launch_bounds__(kThreads) forward_kernel(const EntropyArgs args) {
  using S = Compute<T>;
  const Index count = static_cast<Index>(args.at.count / N);
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  const S norm = static_cast<S>(args.norm);
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    Index at[3];
    args.at.offsets(static_cast<Index>(i * N), at);
    const T* a = static_cast<const T*>(args.logits) + at[0];
    S u[N];
    if constexpr (Binary) {
      load(a, u);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const S z = fabs(u[j]);
        const S e = exp(-z);
        u[j] = log1p(e) + z * e / (1 + e);
      }
    } else {
      Online<S> soft[N];
      read_softmax<N>(a, static_cast<Index>(args.classes), static_cast<Index>(args.class_stride), soft);
#pragma unroll
      for (int j = 0; j < N; ++j) u[j] = log1p(soft[j].rest) + soft[j].t();
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      u[j] *= norm;
      u[j] = u[j] > 1 ? S(1) : u[j];  // not fmin, which would lose NaN
    }
    store(u, static_cast<S*>(args.out) + at[2]);
  }
}

template <typename T, typename Index, int N, bool Binary>
__global__ void __launch_bounds__(kThreads) backward_kernel(const EntropyArgs args) {
  using S = Compute<T>;
  const Index count = static_cast<Index>(args.at.count / N);
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  const S norm = static_cast<S>(args.norm);
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    Index at[3];
    args.at.offsets(static_cast<Index>(i * N), at);
    const T* a = static_cast<const T*>(args.logits) + at[0];
    T* out = static_cast<T*>(args.out) + at[2];
    S g[N], x[N];
    load(static_cast<const S*>(args.grad_u) + at[1], g);
    if constexpr (Binary) {
      load(a, x);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const S e = exp(-fabs(x[j]));
        x[j] = -norm * g[j] * (x[j] * e / ((1 + e) * (1 + e)));
      }
      store(x, out);
    } else {
      const Index classes = static_cast<Index>(args.classes), class_stride = static_cast<Index>(args.class_stride);
      Online<S> soft[N];
      read_softmax<N>(a, classes, class_stride, soft);
#pragma unroll(kClassesAhead<T, N>)
      for (Index k = 0; k < classes; ++k) {
        load(a + k * class_stride, x);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const S d = x[j] - soft[j].max;
          const S p = exp(d) / (1 + soft[j].rest);
          x[j] = -norm * g[j] * (p * (d + soft[j].t()));
        }
        store(x, out + k * static_cast<Index>(args.out_class_stride));
      }
    }
  }
}

template <typename T, typename Index, int N>
void launch(const EntropyArgs& args, cudaStream_t stream) {
  const unsigned blocks = blocks_for(args.at.count / N, kThreads);
  if (args.grad_u == nullptr) {
    const auto kernel = args.classes == 1 ? forward_kernel<T, Index, N, true> : forward_kernel<T, Index, N, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(args);
  } else {
    const auto kernel = args.classes == 1 ? backward_kernel<T, Index, N, true> : backward_kernel<T, Index, N, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(args);
  }
  check_launch();
}

// Packs of N run along a last axis of stride 1 whose length, and every other stride, N divides.
template <typename T, int N>
bool packs(const EntropyArgs& args) {
  const auto& at = args.at;
  const int last = at.dims - 1;
  bool ok = at.inner() % N == 0 && args.class_stride % N == 0 && args.out_class_stride % N == 0;
  for (int t = 0; t < 3; ++t) {
    ok = ok && at.stride[t][last] == 1;
    for (int d = 0; d < last; ++d) ok = ok && at.stride[t][d] % N == 0;
  }
  return ok && aligned(args.logits, 16) && aligned(args.grad_u, 16) && aligned(args.out, 16);
}

template <typename T>
void run(const EntropyArgs& args, bool narrow_index, cudaStream_t stream) {
  constexpr int n = 16 / sizeof(T);
  if (!narrow_index) return launch<T, int64_t, 1>(args, stream);
  if (packs<T, n>(args)) return launch<T, int32_t, n>(args, stream);
  launch<T, int32_t, 1>(args, stream);
}

void run(const EntropyArgs& args, Dtype dtype, bool narrow_index, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32: return run<float>(args, narrow_index, stream);
    case Dtype::float64: return run<double>(args, narrow_index, stream);
    case Dtype::float16: return run<__half>(args, narrow_index, stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(args, narrow_index, stream);
  }
}

double norm_of(int64_t classes) { return 1 / std::log(static_cast<double>(classes == 1 ? 2 : classes)); }

}  // namespace

Tensor entropy_uncertainty_cuda(const Tensor& logits) {
  const Dtype dtype = check_entropy(logits);
  const LaunchScope scope(logits);
  const Tensor u = empty_uncertainty(logits, dtype);
  if (u.numel() == 0) return u;
  const EntropyArgs args{logits.const_data_ptr(), nullptr, u.mutable_data_ptr(), logits.size(1), logits.stride(1), 0,
                         norm_of(logits.size(1)), positions_of<3>({&logits, &u, &u}, {true, false, false})};
  run(args, dtype, fits_32_bits(logits), scope.stream());
  return u;
}

Tensor entropy_uncertainty_backward_cuda(const Tensor& grad_u, const Tensor& logits) {
  const Dtype dtype = check_entropy_backward(grad_u, logits);
  const LaunchScope scope(logits);
  const Tensor grad = torch::stable::empty_like(logits);
  if (grad.numel() == 0) return grad;
  const EntropyArgs args{logits.const_data_ptr(), grad_u.const_data_ptr(), grad.mutable_data_ptr(), logits.size(1),
                         logits.stride(1), grad.stride(1), norm_of(logits.size(1)),
                         positions_of<3>({&logits, &grad_u, &grad}, {true, false, true})};
  run(args, dtype, fits_32_bits(logits) && fits_32_bits(grad) && fits_32_bits(grad_u), scope.stream());
  return grad;
}

}  // namespace bti_fast
