// Loads and stores of the first n lanes, lane masks, horizontal sums and sigmoid (kernels only).
#pragma once

#include <new>
#include <type_traits>

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

using Yes = std::true_type;
using No = std::false_type;

// Uninitialised memory of one task. Not a std::vector: its functions would be shared between instruction sets.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<E*>(::operator new(static_cast<size_t>(count) * sizeof(E) + 64, std::align_val_t(64)))),
        count_(count) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  E* data() { return data_; }
  void clear() { std::memset(data_, 0, static_cast<size_t>(count_) * sizeof(E)); }

 private:
  E* data_;
  int64_t count_;
};

// The first n of all lanes from consecutive elements, zero in the others.
template <typename T>
BTI_FAST_INLINE VecF load_first(const T* p, int n) {
  return n >= VecOf<float>::lanes ? load_dense(p) : load<false>(p, 1, n);
}
template <typename T>
BTI_FAST_INLINE void store_first(VecF v, T* p, int n) {
  if (n >= VecOf<float>::lanes) {
    store_dense(v, p);
  } else {
    store<false>(v, p, 1, n);
  }
}
#if defined(__AVX512F__)
// All ones in the low n bits of 16.
BTI_FAST_INLINE __mmask16 low_bits(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }
template <>
BTI_FAST_INLINE VecF load_first(const float* p, int n) {
  return bits_as<VecF>(_mm512_maskz_loadu_ps(low_bits(n), p));
}
template <>
BTI_FAST_INLINE void store_first(VecF v, float* p, int n) {
  _mm512_mask_storeu_ps(p, low_bits(n), bits_as<__m512>(v));
}
#endif

// How many lanes of the next vector there are, with this many elements left.
BTI_FAST_INLINE int lanes_left(int64_t left) {
  return left < VecOf<float>::lanes ? static_cast<int>(left) : VecOf<float>::lanes;
}

// p[0 .. n) += v
BTI_FAST_INLINE void add_first(VecF v, float* p, int n) { store_first(load_first(p, n) + v, p, n); }

BTI_FAST_INLINE void clear(float* p, int64_t count) { std::memset(p, 0, static_cast<size_t>(count) * sizeof(float)); }

// f(first element, lanes) for each vector of `count` elements.
template <typename F>
BTI_FAST_INLINE void each_vector(int64_t count, F f) {
  int64_t i = 0;
  for (; i + VecOf<float>::lanes <= count; i += VecOf<float>::lanes) f(i, VecOf<float>::lanes);
  if (i < count) f(i, static_cast<int>(count - i));
}

BTI_FAST_INLINE VecI load_mask(const int32_t* p) {
  VecI m;
  std::memcpy(&m, p, sizeof(m));
  return m;
}

// All bits set in the first n lanes.
BTI_FAST_INLINE VecI first_lanes(int n) {
  VecI lane;
  for (int i = 0; i < VecOf<float>::lanes; ++i) lane[i] = i;
  return lane < n;
}

// v where the mask is set, zero (also for NaN) elsewhere.
BTI_FAST_INLINE VecF keep(VecI mask, VecF v) { return bits_as<VecF>(bits_as<VecI>(v) & mask); }

// What `op` makes of all lanes, taken in pairs.
template <typename Op>
BTI_FAST_INLINE float across(VecF v, Op op) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter part[kBytes / 16];
  std::memcpy(part, &v, sizeof(v));
  for (int step = kBytes / 32; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] = op(part[i], part[i + step]);
  const Quarter q = part[0];
  return op(op(q[0], q[1]), op(q[2], q[3]));
}
BTI_FAST_INLINE float lane_sum(VecF v) {
  return across(v, [](auto a, auto b) { return a + b; });
}

BTI_FAST_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp_nonpositive(-abs(x));
  return (x < 0 ? e : splat<VecF>(1.0f)) / (1 + e);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
