// Packed codes: code k of a frame is at bits [k * bits, (k + 1) * bits), least significant first; 1 <= bits <= 24.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels assume a little-endian machine"
#endif

namespace soda {

inline int64_t frame_width(int64_t slots, int64_t bits) { return (slots * bits + 7) / 8; }

// Codes [slot, slot + count) of a frame, with `add` and then one `step` more for each slot. Reads no byte but theirs.
inline void unpack_codes(const uint8_t* frame, int64_t slot, int64_t count, int bits, uint32_t add, uint32_t step,
                         int32_t* out) {
  const uint32_t mask = (1u << bits) - 1;
  const int64_t bit = slot * bits;
  const uint8_t* in = frame + bit / 8;
  if (count == 0) return;
  int have = 8 - static_cast<int>(bit % 8);
  uint32_t held = *in++ >> (bit % 8);  // at most 23 + 8 bits
  add += step * static_cast<uint32_t>(slot);
  for (int64_t k = 0; k < count; ++k, add += step) {
    while (have < bits) {
      held |= static_cast<uint32_t>(*in++) << have;
      have += 8;
    }
    out[k] = static_cast<int32_t>(add + (held & mask));
    held >>= bits;
    have -= bits;
  }
}

#ifdef SODA_AVX2
// For 16 bits at most: eight codes are `bits` bytes, and no code reaches over more than three: load 16 bytes, give each lane the three bytes
// of its code, shift and mask.
__attribute__((target("avx2"))) inline void unpack_frames_avx2(const uint8_t* in, const uint8_t* end, int64_t frames,
                                                               int64_t slots, int bits, uint32_t add, uint32_t step,
                                                               int32_t* out) {
  alignas(32) uint8_t shuffle[32];
  alignas(32) uint32_t shift[8], offset[8];
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int byte = k * bits / 8 + i;
      shuffle[4 * k + i] = i < 3 && byte < 16 ? byte : 0x80;  // 0x80: a zero
    }
    shift[k] = k * bits % 8;
    offset[k] = add + step * k;
  }
  const __m256i shuffles = _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffle));
  const __m256i shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
  const __m256i offsets = _mm256_load_si256(reinterpret_cast<const __m256i*>(offset));
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  const __m256i next = _mm256_set1_epi32(static_cast<int32_t>(8 * step));
  const int64_t width = frame_width(slots, bits), whole = slots & ~int64_t{7};
  for (int64_t f = 0; f < frames; ++f, in += width, out += slots) {
    if (end - in < width + 16) {  // a load of 16 bytes could reach over the end of the plane
      unpack_codes(in, 0, slots, bits, add, step, out);
      continue;
    }
    __m256i ids = offsets;
    const uint8_t* group = in;
    for (int64_t k = 0; k < whole; k += 8, group += bits) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
      __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), shuffles);
      codes = _mm256_and_si256(_mm256_srlv_epi32(codes, shifts), mask);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), _mm256_add_epi32(codes, ids));
      ids = _mm256_add_epi32(ids, next);
    }
    unpack_codes(in, whole, slots - whole, bits, add, step, out + whole);
  }
}
#endif

// Whole frames. `end` is the end of the plane: nothing is read there or behind it.
inline void unpack_frames(const uint8_t* in, const uint8_t* end, int64_t frames, int64_t slots, int bits, uint32_t add,
                          uint32_t step, int32_t* out) {
#ifdef SODA_AVX2
  if (slots >= 8 && bits <= 16 && use_avx2()) return unpack_frames_avx2(in, end, frames, slots, bits, add, step, out);
#endif
  for (int64_t f = 0; f < frames; ++f)
    unpack_codes(in + f * frame_width(slots, bits), 0, slots, bits, add, step, out + f * slots);
}

// Packs whole frames. False if a code is not in [0, 2**bits); then what it wrote is meaningless.
template <class Code>
bool pack_frames(const Code* in, int64_t frames, int64_t slots, int bits, uint8_t* out) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  const int64_t whole = bits <= 16 ? slots & ~int64_t{7} : 0;
  uint64_t seen = 0;
  for (int64_t f = 0; f < frames; ++f, in += slots) {
    for (int64_t k = 0; k < whole; k += 8) {  // eight codes are `bits` bytes, 16 at most: two words of four codes
      uint64_t low = 0, high = 0;
      for (int i = 0; i < 4; ++i) {
        const uint64_t a = static_cast<uint64_t>(int64_t{in[k + i]}), b = static_cast<uint64_t>(int64_t{in[k + 4 + i]});
        seen |= a | b;
        low |= a << (i * bits);
        high |= b << (i * bits);
      }
      const int half = 4 * bits;
      if (half < 64) {
        low |= high << half;
        high >>= 64 - half;
      }
      const uint64_t words[2] = {low, high};
      std::memcpy(out, words, bits);
      out += bits;
    }
    uint32_t held = 0;
    int have = 0;
    for (int64_t k = whole; k < slots; ++k) {
      const uint64_t code = static_cast<uint64_t>(int64_t{in[k]});
      seen |= code;
      held |= static_cast<uint32_t>(code & mask) << have;
      for (have += bits; have >= 8; have -= 8, held >>= 8) *out++ = static_cast<uint8_t>(held);
    }
    if (have) *out++ = static_cast<uint8_t>(held);
  }
  return (seen & ~mask) == 0;
}

}  // namespace soda
