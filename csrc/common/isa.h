// The instruction set that the CPU kernels run with: the best this processor has, unless another is forced.
#pragma once

#if defined(__GNUC__)
#define BTI_FAST_EXPORT __attribute__((visibility("default")))
#else
#define BTI_FAST_EXPORT
#endif

namespace bti_fast {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

BTI_FAST_EXPORT const char* isa_name(Isa isa);
// True where the processor, the operating system and this build all have it.
BTI_FAST_EXPORT bool isa_supported(Isa isa);
BTI_FAST_EXPORT Isa isa_in_use();
// nullptr or "auto": back to the best one. Throws std::invalid_argument for an unknown name and
// std::runtime_error for a set that this machine or build lacks.
BTI_FAST_EXPORT void isa_force(const char* name);

}  // namespace bti_fast
