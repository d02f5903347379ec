// Random access into a compact token stream on a device; ../cpu/expand.h does the same, and believes as little.
//
// A block makes a tile of one window. Two warps search the runs of the tile's first and last token, 32 probes a step;
// its threads search between those two, which mostly are the same.
#pragma once

#include "bits.cuh"

namespace soda {

constexpr int kTile = 2048;  // tokens

struct DeviceStream {
  Frames text;
  int64_t text_tokens;
  Frames frames;
  int64_t n_frames;
  const int64_t* starts;
  const int64_t* firsts;
  int64_t runs;
  uint32_t audio_base, entries;
};

// The last run that begins at `token` or before it, or -1. All threads of a warp must call it. It ends whatever the
// table holds: every step leaves less than a 32nd of the range, and one at the end of it.
__device__ inline int64_t find_run(const int64_t* starts, int64_t runs, int64_t token) {
  const int lane = threadIdx.x & 31;
  int64_t low = 0, high = runs;  // starts[low - 1] <= token < starts[high]
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + step * (lane + 1) - 1;
    const unsigned before = __ballot_sync(~0u, probe < high && starts[probe] <= token);
    const int n = before == ~0u ? 32 : __ffs(~before) - 1;  // probes in a row that are not behind the token
    high = min(high, low + step * (n + 1) - 1);
    low += step * n;
  }
  return low - 1;
}

struct Stretch {
  bool audio;
  int64_t index;  // of the token in its plane: of the text tokens, or of all codes
  int64_t end;    // the first token behind the stretch
};

// The stretch of audio or text in which `token` lies, which must be of `run`. False if the tables are damaged.
__device__ inline bool locate(const DeviceStream& s, int64_t run, int64_t token, Stretch& found) {
  const int64_t stop = s.starts[run + 1];
  if (stop <= token) return false;
  int64_t frames_before = 0;
  if (run >= 0) {
    const int64_t start = s.starts[run], first = s.firsts[run], last = s.firsts[run + 1];
    if (start < 0 || start > token || first < 0 || last < first || last > s.n_frames) return false;
    const int64_t codes = int64_t{s.frames.slots} * (last - first);
    if (codes > stop - start) return false;
    if (token < start + codes) {
      found = {true, first * s.frames.slots + (token - start), start + codes};
      return true;
    }
    frames_before = last;
  }
  found = {false, token - int64_t{s.frames.slots} * frames_before, stop};
  return found.index >= 0 && found.index < s.text_tokens;
}

// `count` ids (4 at most) from a stretch that holds as many. False if they are not in the plane.
__device__ inline bool read_ids(const DeviceStream& s, const Stretch& at, int count, uint32_t (&id)[4]) {
  uint32_t slot[4];
  if (at.audio) {  // the frames were checked by `locate`
    read_codes(s.frames, at.index, count, id, slot);
#pragma unroll
    for (int j = 0; j < 4; ++j) id[j] += s.audio_base + s.entries * slot[j];
    return true;
  }
  if (count > s.text_tokens - at.index) return false;
  read_codes(s.text, at.index, count, id, slot);
  return true;
}

// Block b makes tile b % tiles of window b / tiles. A row begins anywhere, but vectors are stored where 16 bytes begin:
// a tile begins up to three tokens before its row. `bad` becomes the least number of a window that cannot be read.
__global__ void __launch_bounds__(kThreads)
    expand_kernel(DeviceStream s, const int64_t* begins, int64_t length, int64_t tiles, int32_t* out,
                  unsigned long long* bad) {
  __shared__ int64_t run_at[2];
  const int64_t window = blockIdx.x / tiles, row = window * length;
  const int64_t tile = blockIdx.x % tiles * kTile - (row & 3);
  const int64_t from = max(tile, int64_t{0}), to = min(tile + kTile, length);
  const int64_t begin = begins[window], total = s.starts[s.runs];
  if (from >= to) return;
  if (begin < 0 || total < length || begin > total - length) {
    if (threadIdx.x == 0) atomicMin(bad, static_cast<unsigned long long>(window));
    return;
  }
  if (threadIdx.x < 64) {
    const int side = threadIdx.x / 32;
    const int64_t run = find_run(s.starts, s.runs, begin + (side ? to - 1 : from));
    if (threadIdx.x % 32 == 0) run_at[side] = run;
  }
  __syncthreads();

  bool good = true;
  for (int64_t p = tile + 4 * threadIdx.x; p < to; p += 4 * kThreads) {
    const int64_t first = max(p, int64_t{0}), last = min(p + 4, to);
    int64_t run = run_at[0], high = run_at[1];
    while (run < high) {
      const int64_t middle = run + (high - run + 1) / 2;
      if (s.starts[middle] <= begin + first)
        run = middle;
      else
        high = middle - 1;
    }
    Stretch at;
    uint32_t id[4];
    if (!locate(s, run, begin + first, at)) {
      good = false;
      continue;
    }
    if (last - first == 4 && begin + last <= at.end) {
      good &= read_ids(s, at, 4, id);
      if (good) *reinterpret_cast<int4*>(out + row + p) = make_int4(id[0], id[1], id[2], id[3]);
      continue;
    }
    for (int64_t q = first; q < last; ++q) {  // an end of the row, or of a stretch
      while (run + 1 < s.runs && s.starts[run + 1] <= begin + q) ++run;
      if (!locate(s, run, begin + q, at) || !read_ids(s, at, 1, id)) {
        good = false;
        break;
      }
      out[row + q] = static_cast<int32_t>(id[0]);
    }
  }
  if (!good) atomicMin(bad, static_cast<unsigned long long>(window));
}

}  // namespace soda
