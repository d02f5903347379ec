// Which vector instructions may be used: decided when a kernel runs, so that one library serves every CPU.
#pragma once

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#define SODA_AVX2
#include <immintrin.h>
#endif

namespace soda {

inline std::atomic<bool> simd_allowed{true};  // tests turn it off to reach the plain code

#ifdef SODA_AVX2
inline bool use_avx2() {
  static const bool there = __builtin_cpu_supports("avx2");
  return there && simd_allowed.load(std::memory_order_relaxed);
}

inline bool use_fma() {
  static const bool there = __builtin_cpu_supports("fma");
  return there && use_avx2();
}
#endif

}  // namespace soda
