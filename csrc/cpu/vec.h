// Vectors of one instruction set: arithmetic from the compiler's vector extension, plus loads of every storage
// dtype, exp, log1p. Include in *_kernel.cpp only, which is compiled once per instruction set with BTI_FAST_ISA set.
// Every function is inlined and lives in that namespace, so no code for one processor is linked into another's path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define BTI_FAST_INLINE inline __attribute__((always_inline))

namespace bti_fast {
namespace BTI_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <typename S>
struct VecOf;
template <>
struct VecOf<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
};
template <>
struct VecOf<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
};

using VecF = VecOf<float>::type;
using VecI = VecOf<float>::mask;
using VecD = VecOf<double>::type;

// What a storage dtype is computed in.
template <typename T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

template <typename To, typename From>
BTI_FAST_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The same scalar in every lane.
template <typename V, typename S>
BTI_FAST_INLINE V splat(S s) { return s - V{}; }

BTI_FAST_INLINE float widen(float x) { return x; }
BTI_FAST_INLINE double widen(double x) { return x; }
BTI_FAST_INLINE float widen(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
BTI_FAST_INLINE float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Infinity and NaN keep an all-ones exponent; everything else, subnormals too, is rescaled exactly by 2^112.
  const float value = magnitude >= 0x0f800000u ? bits_as<float>(magnitude | 0x7f800000u)
                                               : bits_as<float>(magnitude) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

BTI_FAST_INLINE void narrow(float x, float* out) { *out = x; }
BTI_FAST_INLINE void narrow(double x, double* out) { *out = x; }
BTI_FAST_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t b = bits_as<uint32_t>(x);
  out->bits = x != x ? 0x7fc0u : static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
BTI_FAST_INLINE void narrow(float x, Half* out) {
  const uint32_t b = bits_as<uint32_t>(x);
  const uint32_t sign = (b >> 16) & 0x8000u;
  const uint32_t magnitude = b & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let the float adder round to a multiple of 2^-24
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <typename T>
using ComputeVec = VecOf<typename ComputeOf<T>::type>;

// All lanes from consecutive elements.
template <typename T>
BTI_FAST_INLINE typename ComputeVec<T>::type load_dense(const T* p) {
  typename ComputeVec<T>::type v;
  if constexpr (sizeof(T) >= 4) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    for (int i = 0; i < ComputeVec<T>::lanes; ++i) v[i] = widen(p[i]);
  }
  return v;
}
template <typename T>
BTI_FAST_INLINE void store_dense(typename ComputeVec<T>::type v, T* p) {
  if constexpr (sizeof(T) >= 4) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    for (int i = 0; i < ComputeVec<T>::lanes; ++i) narrow(v[i], p + i);
  }
}

typedef uint16_t Bits16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));
template <>
BTI_FAST_INLINE VecF load_dense(const BFloat16* p) {
  Bits16 b;
  std::memcpy(&b, p, sizeof(b));
  return bits_as<VecF>(__builtin_convertvector(b, Bits32) << 16);
}
template <>
BTI_FAST_INLINE void store_dense(VecF v, BFloat16* p) {
  const Bits32 b = bits_as<Bits32>(v);
  Bits32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  rounded = (v != v) ? (Bits32{} + 0x7fc0u) : rounded;
  const Bits16 out = __builtin_convertvector(rounded, Bits16);
  std::memcpy(p, &out, sizeof(out));
}
#if defined(__AVX512F__)
template <>
BTI_FAST_INLINE VecF load_dense(const Half* p) {
  return bits_as<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
template <>
BTI_FAST_INLINE void store_dense(VecF v, Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
BTI_FAST_INLINE VecF load_dense(const Half* p) {
  return bits_as<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <>
BTI_FAST_INLINE void store_dense(VecF v, Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#endif

// The first n lanes from elements `stride` apart, zero in the others; Dense: all lanes, stride 1.
template <bool Dense, typename T>
BTI_FAST_INLINE typename ComputeVec<T>::type load(const T* p, int64_t stride, int n) {
  if constexpr (Dense) {
    return load_dense(p);
  } else {
    typename ComputeVec<T>::type v{};
    for (int i = 0; i < ComputeVec<T>::lanes; ++i)
      if (i < n) v[i] = widen(p[i * stride]);
    return v;
  }
}
template <bool Dense, typename T>
BTI_FAST_INLINE void store(typename ComputeVec<T>::type v, T* p, int64_t stride, int n) {
  if constexpr (Dense) {
    store_dense(v, p);
  } else {
    for (int i = 0; i < ComputeVec<T>::lanes; ++i)
      if (i < n) narrow(v[i], p + i * stride);
  }
}

// exp(x) for x <= 0, 1 ulp (Cephes' expf); 0 below the normal range, NaN for NaN.
BTI_FAST_INLINE VecF exp_nonpositive(VecF x) {
  const VecF bounded = x < -87.33654f ? splat<VecF>(-87.33654f) : x;
  // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
  const VecF shifted = bounded * 1.44269504f + 12582912.0f;
  const VecF n = shifted - 12582912.0f;
  const VecF r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat<VecF>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const VecI exponent = bits_as<VecI>(shifted) << 23;
  const VecF y = bits_as<VecF>(bits_as<VecI>(p) + exponent);
  const VecF zeroed = x < -87.33654f ? VecF{} : y;
  return x != x ? x : zeroed;
}
BTI_FAST_INLINE VecD exp_nonpositive(VecD x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = ::exp(x[i]);
  return x;
}

// log(1 + x) for finite x >= 0, about 1 ulp also near 0; NaN for NaN.
BTI_FAST_INLINE VecF log1p_nonnegative(VecF x) {
  const VecF y = 1.0f + x;
  const VecF lost = (x - (y - 1.0f)) / y;  // what rounding 1 + x dropped, to first order
  VecI exponent = (bits_as<VecI>(y) >> 23) - 127;
  VecF m = bits_as<VecF>((bits_as<VecI>(y) & 0x007fffff) | 0x3f800000);  // [1, 2)
  const VecI high = m > 1.41421356f;
  m = high ? m * 0.5f : m;
  exponent = exponent - high;  // true is -1
  const VecF n = __builtin_convertvector(exponent, VecF);
  const VecF f = m - 1.0f;
  const VecF f2 = f * f;
  VecF p = splat<VecF>(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  VecF log = p * f * f2 + n * -2.12194440e-4f - 0.5f * f2 + f + n * 0.693359375f;
  return log + lost;
}
BTI_FAST_INLINE VecD log1p_nonnegative(VecD x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = ::log1p(x[i]);
  return x;
}

template <typename V>
BTI_FAST_INLINE V abs(V x) { return x < 0 ? -x : x; }

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
