// Packed codes on a device; ../cpu/bits.h describes the format.
//
// A thread makes four neighbouring outputs and stores them as one vector. Frames begin at any byte, so what it needs is
// read byte by byte; the threads of a warp read neighbouring bytes, which the first-level cache holds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace soda {

constexpr int kThreads = 256;

struct Frames {
  const uint8_t* plane;
  int64_t width;  // bytes of a frame
  uint32_t slots;
  int bits;

  // Without padding between frames, codes of two frames can be cut from the same bytes.
  __device__ bool dense() const { return width * 8 == int64_t{slots} * bits; }
};

// index = frame * slots + slot. A 64-bit division is slow, and seldom needed.
__device__ inline void split(int64_t index, uint32_t slots, int64_t& frame, uint32_t& slot) {
  if (index >> 32 == 0) {
    const uint32_t small = static_cast<uint32_t>(index);
    frame = small / slots;
    slot = small % slots;
  } else {
    frame = index / slots;
    slot = static_cast<uint32_t>(index % slots);
  }
}

__device__ inline uint64_t load_bytes(const uint8_t* in, int count) {  // count <= 8
  uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) word |= static_cast<uint64_t>(in[i]) << 8 * i;
  return word;
}

// `count` codes (4 at most) from bit `slot * bits` of a frame, which must be of that frame or, if dense, of the next
// ones. False, and nothing done, if they do not fit 64 bits.
__device__ inline bool cut(const Frames& f, int64_t frame, uint32_t slot, int count, uint32_t (&code)[4]) {
  const int64_t bit = int64_t{slot} * f.bits;
  const int shift = static_cast<int>(bit & 7), need = shift + count * f.bits;
  if (need > 64) return false;
  const uint64_t word = load_bytes(f.plane + frame * f.width + (bit >> 3), (need + 7) >> 3) >> shift;
  const uint32_t mask = (1u << f.bits) - 1;
#pragma unroll
  for (int j = 0; j < 4; ++j) code[j] = static_cast<uint32_t>(word >> (j * f.bits & 63)) & mask;
  return true;
}

// Codes index .. index + count - 1 (4 at most), counted from the first frame's first, and the slots that they are of.
__device__ inline void read_codes(const Frames& f, int64_t index, int count, uint32_t (&code)[4], uint32_t (&slot)[4]) {
  int64_t frame[4];
  split(index, f.slots, frame[0], slot[0]);
#pragma unroll
  for (int j = 1; j < 4; ++j) {
    const bool next = slot[j - 1] + 1 == f.slots;
    slot[j] = next ? 0 : slot[j - 1] + 1;
    frame[j] = frame[j - 1] + next;
  }
  if ((f.dense() || slot[0] + count <= f.slots) && cut(f, frame[0], slot[0], count, code)) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) break;
    uint32_t one[4];
    cut(f, frame[j], slot[j], 1, one);
    code[j] = one[0];
  }
}

__global__ void unpack_kernel(Frames f, int64_t codes, int32_t* out) {
  const int64_t index = 4 * (blockIdx.x * int64_t{kThreads} + threadIdx.x);
  if (index >= codes) return;
  const int count = static_cast<int>(min(int64_t{4}, codes - index));
  uint32_t code[4], slot[4];
  read_codes(f, index, count, code, slot);
  if (count == 4) {
    *reinterpret_cast<int4*>(out + index) = make_int4(code[0], code[1], code[2], code[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 3; ++j)
    if (j < count) out[index + j] = code[j];
}

// `bad` becomes the least index of a code outside [0, 2**bits). `width` and `slots` as in Frames; `bytes` in all.
template <class Code>
__global__ void pack_kernel(const Code* codes, uint32_t width, uint32_t slots, int bits, int64_t bytes, uint8_t* out,
                            unsigned long long* bad) {
  const int64_t index = 4 * (blockIdx.x * int64_t{kThreads} + threadIdx.x);
  if (index >= bytes) return;
  const int count = static_cast<int>(min(int64_t{4}, bytes - index));
  int64_t frame;
  uint32_t byte, word = 0;
  split(index, width, frame, byte);
  for (int j = 0; j < count; ++j) {
    const uint32_t bit = 8 * byte;  // slots is at most 2**24, so that this fits
    for (uint32_t slot = bit / bits; slot < slots && slot * bits < bit + 8; ++slot) {
      const int64_t place = frame * slots + slot;
      const int64_t code = codes[place];
      if (code < 0 || code >> bits) atomicMin(bad, static_cast<unsigned long long>(place));
      const int shift = static_cast<int>(slot * bits) - static_cast<int>(bit);  // -23 to 7
      const uint32_t part = static_cast<uint32_t>(code) & ((1u << bits) - 1);
      word |= ((shift >= 0 ? part << shift : part >> -shift) & 255u) << 8 * j;
    }
    if (++byte == width) byte = 0, ++frame;
  }
  if (count == 4) {
    *reinterpret_cast<uint32_t*>(out + index) = word;
    return;
  }
  for (int j = 0; j < count; ++j) out[index + j] = static_cast<uint8_t>(word >> 8 * j);
}

}  // namespace soda
