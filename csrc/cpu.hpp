// What this CPU can do, asked once at run time: the build itself is for any x86-64 or arm64.
#pragma once

#include <algorithm>

#ifdef __x86_64__
#include <immintrin.h>
#define R1_X86 1
#define R1_AVX2 __attribute__((target("avx2")))
#define R1_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))
#endif
#define R1_INLINE __attribute__((always_inline)) inline

// Lower it to test on one machine what narrower ones run.
#ifndef R1_MAX_WIDTH
#define R1_MAX_WIDTH 8
#endif

namespace r1 {

// Doubles that one vector of this CPU holds.
inline int vector_width() {
#ifdef R1_X86
  static const bool avx512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx2 = __builtin_cpu_supports("avx2");
  return std::min(R1_MAX_WIDTH, avx512 ? 8 : avx2 ? 4 : 2);
#else
  return 2;
#endif
}

}  // namespace r1
