// What this CPU can do, asked once at run time: the build itself is for any x86-64 or arm64.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#define R1_X86 1
#define R1_AVX2 __attribute__((target("avx2")))
#define R1_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))
#endif
#define R1_INLINE __attribute__((always_inline)) inline

namespace r1 {

// Doubles that one vector of this CPU holds.
inline int vector_width() {
#ifdef R1_X86
  static const int width = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 8
                           : __builtin_cpu_supports("avx2")                                         ? 4
                                                                                                    : 2;
  return width;
#else
  return 2;
#endif
}

}  // namespace r1
