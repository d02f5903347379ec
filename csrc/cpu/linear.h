// Products of a few vectors with a matrix whose rows are read once: x (rows, in), weight (out, in) -> y (rows, out).
// Weights are float, bfloat16, or int8 with a scale a row. This is what a decoder's step does, at the speed of memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace soda {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// A vector in 16-bit integers: x is about `scale` times `values`. The largest is so small that a product with int8
// weights fits in 32 bits: sums are exact, in any order.
struct Quantised {
  std::vector<int16_t> values;
  std::vector<float> scales;

  Quantised(const float* x, int64_t rows, int64_t in) : values(rows * in), scales(rows) {
    const float limit = static_cast<float>(std::min<int64_t>(32767, INT32_MAX / (128 * in)));
    for (int64_t r = 0; r < rows; ++r, x += in) {
      float largest = 0;
      for (int64_t i = 0; i < in; ++i) largest = std::max(largest, std::fabs(x[i]));
      const float by = largest > 0 ? limit / largest : 0;
      scales[r] = largest / limit;
      for (int64_t i = 0; i < in; ++i) values[r * in + i] = static_cast<int16_t>(std::lrintf(x[i] * by));
    }
  }
};

// Rows [from, to) of the matrix, plain C++.
template <class Weight>
void linear_plain(const float* x, int64_t rows, int64_t in, const Weight* weight, int64_t from, int64_t to, float* y,
                  int64_t out) {
  for (int64_t o = from; o < to; ++o)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += x[r * in + i] * to_float(weight[o * in + i]);
      y[r * out + o] = sum;
    }
}

inline void linear_plain(const Quantised& x, int64_t rows, int64_t in, const int8_t* weight, const float* scale,
                         int64_t from, int64_t to, float* y, int64_t out) {
  for (int64_t o = from; o < to; ++o)
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += int32_t{x.values[r * in + i]} * weight[o * in + i];
      y[r * out + o] = static_cast<float>(sum) * (x.scales[r] * scale[o]);
    }
}

#ifdef SODA_AVX2
#define SODA_TARGET __attribute__((target("avx2,fma")))

SODA_TARGET inline __m256 load8(const float* weight) { return _mm256_loadu_ps(weight); }
SODA_TARGET inline __m256 load8(const BFloat16* weight) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

SODA_TARGET inline float sum8(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

SODA_TARGET inline int32_t sum8(__m256i x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// A tile: `Out` rows of the matrix by `Rows` vectors, whose sums stay in registers.
template <int Out, int Rows, class Weight>
SODA_TARGET inline void tile(const float* x, int64_t in, const Weight* weight, float* y, int64_t out) {
  __m256 sums[Out][Rows];
  for (int o = 0; o < Out; ++o)
    for (int r = 0; r < Rows; ++r) sums[o][r] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= in; i += 8) {
    __m256 vectors[Rows];
    for (int r = 0; r < Rows; ++r) vectors[r] = _mm256_loadu_ps(x + r * in + i);
    for (int o = 0; o < Out; ++o) {
      const __m256 w = load8(weight + o * in + i);
      for (int r = 0; r < Rows; ++r) sums[o][r] = _mm256_fmadd_ps(w, vectors[r], sums[o][r]);
    }
  }
  for (int o = 0; o < Out; ++o)
    for (int r = 0; r < Rows; ++r) {
      float sum = sum8(sums[o][r]);
      for (int64_t j = i; j < in; ++j) sum += x[r * in + j] * to_float(weight[o * in + j]);
      y[r * out + o] = sum;
    }
}

template <int Out, int Rows>
SODA_TARGET inline void tile(const int16_t* x, const float* x_scale, int64_t in, const int8_t* weight,
                             const float* scale, float* y, int64_t out) {
  __m256i sums[Out][Rows];
  for (int o = 0; o < Out; ++o)
    for (int r = 0; r < Rows; ++r) sums[o][r] = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= in; i += 16) {
    __m256i vectors[Rows];
    for (int r = 0; r < Rows; ++r)
      vectors[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * in + i));
    for (int o = 0; o < Out; ++o) {
      const __m256i w =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + o * in + i)));
      for (int r = 0; r < Rows; ++r)
        sums[o][r] = _mm256_add_epi32(sums[o][r], _mm256_madd_epi16(w, vectors[r]));
    }
  }
  for (int o = 0; o < Out; ++o)
    for (int r = 0; r < Rows; ++r) {
      int32_t sum = sum8(sums[o][r]);
      for (int64_t j = i; j < in; ++j) sum += int32_t{x[r * in + j]} * weight[o * in + j];
      y[r * out + o] = static_cast<float>(sum) * (x_scale[r] * scale[o]);
    }
}

// For one vector, what counts is how memory is read. Short rows are best read in one stream, with what comes next
// fetched ahead; long ones eight at a time, which is up to 1.4 times as fast.
constexpr int64_t kAhead = 2048, kLongRow = 2048;  // bytes

// One row of the matrix by one vector.

template <class Weight>
SODA_TARGET inline float dot(const float* x, const Weight* weight, int64_t in) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= in; i += 32) {
    for (size_t line = 0; line < 32 * sizeof(Weight); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(weight + i) + kAhead + line, _MM_HINT_T0);
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_fmadd_ps(load8(weight + i + 8 * j), _mm256_loadu_ps(x + i + 8 * j), sums[j]);
  }
  for (; i + 8 <= in; i += 8) sums[0] = _mm256_fmadd_ps(load8(weight + i), _mm256_loadu_ps(x + i), sums[0]);
  float sum = sum8(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  for (; i < in; ++i) sum += x[i] * to_float(weight[i]);
  return sum;
}

SODA_TARGET inline int32_t dot(const int16_t* x, const int8_t* weight, int64_t in) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 64 <= in; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(weight + i) + kAhead, _MM_HINT_T0);
    for (int j = 0; j < 4; ++j) {
      const __m256i w =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i + 16 * j)));
      const __m256i vector = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 16 * j));
      sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(w, vector));
    }
  }
  int32_t sum =
      sum8(_mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3])));
  for (; i < in; ++i) sum += int32_t{x[i]} * weight[i];
  return sum;
}

// Calls `visit.template run<Out, Rows>(o, r)` for tiles that cover rows [from, to) of the matrix and all vectors.
template <class Visit>
SODA_TARGET inline void tiles(int64_t rows, int64_t from, int64_t to, const Visit& visit) {
  int64_t o = from;
  for (; o + 3 <= to; o += 3) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) visit.template run<3, 4>(o, r);
    for (; r < rows; ++r) visit.template run<3, 1>(o, r);
  }
  for (; o < to; ++o)
    for (int64_t r = 0; r < rows; ++r) visit.template run<1, 1>(o, r);
}

template <class Weight>
struct FloatTiles {
  const float* x;
  int64_t in;
  const Weight* weight;
  float* y;
  int64_t out;

  template <int Out, int Rows>
  SODA_TARGET void run(int64_t o, int64_t r) const {
    tile<Out, Rows>(x + r * in, in, weight + o * in, y + r * out + o, out);
  }
};

struct IntegerTiles {
  const Quantised& x;
  int64_t in;
  const int8_t* weight;
  const float* scale;
  float* y;
  int64_t out;

  template <int Out, int Rows>
  SODA_TARGET void run(int64_t o, int64_t r) const {
    tile<Out, Rows>(x.values.data() + r * in, x.scales.data() + r, in, weight + o * in, scale + o, y + r * out + o,
                    out);
  }
};
#endif

// y[r, o] for rows [from, to) of the matrix; `out` is how many it has.
template <class Weight>
void linear(const float* x, int64_t rows, int64_t in, const Weight* weight, int64_t from, int64_t to, float* y,
            int64_t out) {
#ifdef SODA_AVX2
  if (use_fma()) {
    if (rows != 1) return tiles(rows, from, to, FloatTiles<Weight>{x, in, weight, y, out});
    int64_t o = from;
    if (in * static_cast<int64_t>(sizeof(Weight)) >= kLongRow)
      for (; o + 8 <= to; o += 8) tile<8, 1>(x, in, weight + o * in, y + o, out);
    for (; o < to; ++o) y[o] = dot(x, weight + o * in, in);
    return;
  }
#endif
  linear_plain(x, rows, in, weight, from, to, y, out);
}

inline void linear(const Quantised& x, int64_t rows, int64_t in, const int8_t* weight, const float* scale,
                   int64_t from, int64_t to, float* y, int64_t out) {
#ifdef SODA_AVX2
  if (use_fma()) {
    if (rows != 1) return tiles(rows, from, to, IntegerTiles{x, in, weight, scale, y, out});
    for (int64_t o = from; o < to; ++o)
      y[o] = static_cast<float>(dot(x.values.data(), weight + o * in, in)) * (x.scales[0] * scale[o]);
    return;
  }
#endif
  linear_plain(x, rows, in, weight, scale, from, to, y, out);
}

}  // namespace soda
