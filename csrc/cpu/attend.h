// What a decoder's step does between its matrix products: norms, rotary positions, and attention to a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "linear.h"
#include "simd.h"

namespace soda {

// RMS norm of a vector, times `weight`; then, given cosines and signed sines, each pair (i, i + size / 2) is turned.
inline void norm_and_rotate(const float* x, int64_t size, const float* weight, float eps, const float* cosine,
                            const float* sine, float* y) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const float by = 1 / std::sqrt(sum / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) y[i] = weight[i] * (x[i] * by);
  if (!cosine) return;
  for (int64_t i = 0, half = size / 2; i < half; ++i) {
    const float a = y[i], b = y[i + half];
    y[i] = a * cosine[i] + b * sine[i];
    y[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

inline void softmax(float* scores, int64_t length) {
  const float largest = *std::max_element(scores, scores + length);
  float sum = 0;
  for (int64_t i = 0; i < length; ++i) sum += scores[i] = std::exp(scores[i] - largest);
  for (int64_t i = 0; i < length; ++i) scores[i] /= sum;
}

// y (size) = the sum of share[i] times row i of values (length, size).
inline void weighted_sum_plain(const float* share, const float* values, int64_t length, int64_t size, float* y) {
  std::fill(y, y + size, 0.0f);
  for (int64_t i = 0; i < length; ++i, values += size)
    for (int64_t j = 0; j < size; ++j) y[j] += share[i] * values[j];
}

#ifdef SODA_AVX2
SODA_TARGET inline void weighted_sum_avx2(const float* share, const float* values, int64_t length, int64_t size,
                                          float* y) {
  int64_t j = 0;
  for (; j + 8 <= size; j += 8) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < length; ++i)
      sum = _mm256_fmadd_ps(_mm256_set1_ps(share[i]), _mm256_loadu_ps(values + i * size + j), sum);
    _mm256_storeu_ps(y + j, sum);
  }
  for (; j < size; ++j) {
    y[j] = 0;
    for (int64_t i = 0; i < length; ++i) y[j] += share[i] * values[i * size + j];
  }
}
#endif

// Attention of `heads` queries (heads, size) to keys and values (length, size) that they share -> y (heads, size).
// `scores` has room for heads * length numbers.
inline void attend(const float* queries, int64_t heads, const float* keys, const float* values, int64_t length,
                   int64_t size, float* scores, float* y) {
  linear(queries, heads, size, keys, 0, length, scores, length);
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  for (int64_t h = 0; h < heads; ++h) {
    float* share = scores + h * length;
    for (int64_t i = 0; i < length; ++i) share[i] *= scale;
    softmax(share, length);
#ifdef SODA_AVX2
    if (use_fma()) {
      weighted_sum_avx2(share, values, length, size, y + h * size);
      continue;
    }
#endif
    weighted_sum_plain(share, values, length, size, y + h * size);
  }
}

}  // namespace soda
