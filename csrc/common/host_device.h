// Functions that the CPU code and the GPU kernels share.
#pragma once

#if defined(__CUDACC__)
#define BTI_FAST_HD __host__ __device__ __forceinline__
#else
#define BTI_FAST_HD inline __attribute__((always_inline))
#endif
