#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

namespace sib_fast::cpu {
namespace {

Capability highest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Capability::avx512;
    }
    return Capability::avx2;
  }
#endif
  return Capability::baseline;
}

Capability decide() {
  const Capability best = highest();
  const char* wish = std::getenv("SIB_FAST_CPU_CAPABILITY");
  if (wish == nullptr) return best;
  Capability wanted = best;
  if (std::strcmp(wish, "baseline") == 0) wanted = Capability::baseline;
  if (std::strcmp(wish, "avx2") == 0) wanted = Capability::avx2;
  return wanted < best ? wanted : best;
}

}  // namespace

Capability capability() {
  static const Capability chosen = decide();
  return chosen;
}

const char* capability_name() {
  static const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(capability())];
}

}  // namespace sib_fast::cpu
