// A 64-bit hash of a document: a sum of mixed (position, id), so that its terms need not wait for each other.
#pragma once

#include <cstdint>

#include "simd.h"

namespace soda {

inline uint64_t splitmix64(uint64_t value) {  // the output function of SplitMix64 (Steele et al., 2014)
  value += 0x9E3779B97F4A7C15;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

inline __attribute__((always_inline)) uint64_t sum_mixed(const int32_t* ids, int64_t length) {
  uint64_t sum = 0;
  for (int64_t p = 0; p < length; ++p)
    sum += splitmix64(static_cast<uint32_t>(ids[p]) + (static_cast<uint64_t>(p + 1) << 32));
  return sum;
}

#ifdef SODA_AVX2
// The compiler vectorises the loop; AVX-512 has a 64-bit multiplication.
__attribute__((target("avx512f,avx512dq,avx512vl,prefer-vector-width=512"))) inline uint64_t sum_mixed_avx512(
    const int32_t* ids, int64_t length) {
  return sum_mixed(ids, length);
}
inline bool use_avx512() {
  static const bool there = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return there && simd_allowed.load(std::memory_order_relaxed);
}
#endif

inline uint64_t hash_document(const int32_t* ids, int64_t length) {
#ifdef SODA_AVX2
  const uint64_t sum = use_avx512() ? sum_mixed_avx512(ids, length) : sum_mixed(ids, length);
#else
  const uint64_t sum = sum_mixed(ids, length);
#endif
  return splitmix64(sum ^ static_cast<uint64_t>(length));
}

}  // namespace soda
