// A CPU kernel is declared once and exists once per instruction set, in the namespace of that name:
//   BTI_FAST_KERNEL(void, entropy_forward, (const EntropyForward&, int64_t begin, int64_t end));
//   BTI_FAST_SELECT(entropy_forward)   -> pointer to the one for the instruction set in use
#pragma once

#include "common/isa.h"

#ifdef BTI_FAST_X86
#define BTI_FAST_KERNEL(ret, name, args) \
  namespace portable { ret name args; }  \
  namespace avx2 { ret name args; }      \
  namespace avx512 { ret name args; }
#define BTI_FAST_SELECT(name)                                                          \
  (::bti_fast::isa_in_use() == ::bti_fast::Isa::avx512 ? &::bti_fast::avx512::name     \
   : ::bti_fast::isa_in_use() == ::bti_fast::Isa::avx2 ? &::bti_fast::avx2::name       \
                                                       : &::bti_fast::portable::name)
#else
#define BTI_FAST_KERNEL(ret, name, args) \
  namespace portable { ret name args; }
#define BTI_FAST_SELECT(name) (&::bti_fast::portable::name)
#endif
