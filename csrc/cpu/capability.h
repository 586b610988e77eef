// Which of the compiled instruction sets this machine runs: baseline, avx2 or avx512.
#pragma once

namespace sib_fast::cpu {

enum class Capability { baseline, avx2, avx512 };

// Decided at first use. SIB_FAST_CPU_CAPABILITY=baseline|avx2|avx512 lowers it (tests run every variant that way).
Capability capability();
const char* capability_name();

// The reference to the kernels of this machine: SIB_FAST_PICK(mask_kernels, float) is mask_kernels_avx512<float>() or
// so.
#if defined(__x86_64__)
#define SIB_FAST_PICK(stem, T)                                                               \
  (::sib_fast::cpu::capability() == ::sib_fast::cpu::Capability::avx512 ? stem##_avx512<T>() \
   : ::sib_fast::cpu::capability() == ::sib_fast::cpu::Capability::avx2 ? stem##_avx2<T>()   \
                                                                        : stem##_baseline<T>())
#else
#define SIB_FAST_PICK(stem, T) stem##_baseline<T>()
#endif

}  // namespace sib_fast::cpu
