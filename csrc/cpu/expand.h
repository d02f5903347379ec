// Random access into a compact token stream: text tokens with runs of whole audio frames between them.
// megatron_soda/ops/__init__.py describes the tables. They may be of a damaged file: nothing in them is believed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bits.h"

namespace soda {

// Whole frames of packed codes, as ids: code c of slot k is `add` + `step` * k + c.
struct Plane {
  const uint8_t* data;
  int64_t frames, slots;
  int bits;
  uint32_t add, step;

  int64_t codes() const { return frames * slots; }

  // Codes [index, index + count), which must be in the plane.
  void read(int64_t index, int64_t count, int32_t* out) const {
    const int64_t width = frame_width(slots, bits), slot = index % slots;
    const uint8_t* frame = data + index / slots * width;
    if (slot) {
      const int64_t some = std::min(count, slots - slot);
      unpack_codes(frame, slot, some, bits, add, step, out);
      frame += width, out += some, count -= some;
    }
    const int64_t whole = count / slots;
    unpack_frames(frame, data + frames * width, whole, slots, bits, add, step, out);
    unpack_codes(frame + whole * width, 0, count % slots, bits, add, step, out + whole * slots);
  }
};

struct Stream {
  Plane text, audio;
  const int64_t* starts;
  const int64_t* firsts;
  int64_t runs;

  int64_t total() const { return starts[runs]; }

  // Tokens [begin, begin + length), which must lie in [0, total). False if the tables lead outside the planes.
  bool read(int64_t begin, int64_t length, int32_t* out) const {
    int64_t token = begin;
    const int64_t end = begin + length;
    int64_t run = std::upper_bound(starts, starts + runs, begin) - starts - 1;
    for (; token < end; ++run) {
      if (run >= runs) return false;
      int64_t frames_before = 0, stop = starts[run + 1];
      if (stop < token) return false;
      if (run >= 0) {
        const int64_t start = starts[run], first = firsts[run], last = firsts[run + 1];
        if (start < 0 || start > token || first < 0 || last < first || last > audio.frames) return false;
        if (audio.slots * (last - first) > stop - start) return false;
        const int64_t audio_end = start + audio.slots * (last - first);
        if (token < audio_end) {
          const int64_t count = std::min(end, audio_end) - token;
          audio.read(first * audio.slots + token - start, count, out);
          token += count, out += count;
        }
        frames_before = last;
      }
      stop = std::min(stop, end);
      if (token < stop) {
        const int64_t index = token - audio.slots * frames_before;
        if (index < 0 || index > text.codes() || stop - token > text.codes() - index) return false;
        text.read(index, stop - token, out);
        out += stop - token, token = stop;
      }
    }
    return true;
  }
};

}  // namespace soda
