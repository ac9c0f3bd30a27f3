// What the tensor-core kernels ask of the machine. A host build includes tests/csrc/emulator.h first, which defines the
// same names for a block of threads that it runs on the CPU; the kernels above this file are the same source for both.
#pragma once

#if defined(__CUDACC__)

#include "cuda/vec.cuh"

#define BTI_FAST_DEVICE __device__ __forceinline__

namespace bti_fast {

using Half = __half;
using BFloat16 = __nv_bfloat16;

BTI_FAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// Read anew by every call, so that the compiler does not keep in registers what follows from it.
BTI_FAST_DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
BTI_FAST_DEVICE void sync_block() { __syncthreads(); }
BTI_FAST_DEVICE void sync_warp() { __syncwarp(); }
BTI_FAST_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
BTI_FAST_DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
BTI_FAST_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// 2^x to 2^-22, relative; exact 0 and infinity at the ends, NaN stays.
BTI_FAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

BTI_FAST_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix i in shared memory (16 bytes,
// aligned); lane 4 g + t receives elements (g, 2t) and (g, 2t + 1) of matrix i in out[i], of its transpose if Transpose.
template <bool Transpose>
BTI_FAST_DEVICE void load_matrices(const void* row, uint32_t (&out)[4]) {
  if constexpr (Transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
  }
}

// c (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t holds, in pairs of neighbours along the row of a, the column of b
// and the row of c:  a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);  b: (2t, g), (2t + 8, g);
// c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
BTI_FAST_DEVICE void multiply_add(Half, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BTI_FAST_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c (16 x 8) += a (16 x 8) b (8 x 8) of TF32.  a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: (t, g), (t + 4, g).
BTI_FAST_DEVICE void multiply_add_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// The nearest number with TF32's 10 bits of fraction.
BTI_FAST_DEVICE float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// Bytes (4 or 16, aligned) from global to shared memory, those beyond `valid` zero; done at the next copy_wait.
template <int Bytes>
BTI_FAST_DEVICE void copy_async(void* to, const void* from, int valid) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  }
}
BTI_FAST_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two neighbours in one register, the first in the low half.
BTI_FAST_DEVICE uint32_t pack(Half, float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}
BTI_FAST_DEVICE uint32_t pack(BFloat16, float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}

}  // namespace bti_fast

#endif
