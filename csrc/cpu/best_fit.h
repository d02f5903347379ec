// Best-fit decreasing bin packing by integer rooms.
#pragma once

#include <cstdint>
#include <vector>

namespace soda {

// A set of integers in [0, size): bitmaps of 64 over bitmaps of 64, so that a search takes log64(size) steps.
class BitTree {
 public:
  explicit BitTree(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(int64_t value) {
    for (auto& level : levels_) {
      level[value >> 6] |= uint64_t{1} << (value & 63);
      value >>= 6;
    }
  }

  void erase(int64_t value) {
    for (auto& level : levels_) {
      level[value >> 6] &= ~(uint64_t{1} << (value & 63));
      if (level[value >> 6]) return;
      value >>= 6;
    }
  }

  // The least member >= value, or -1.
  int64_t at_least(int64_t value) const {
    for (size_t up = 0; up < levels_.size(); ++up) {
      const int64_t word = value >> 6;
      if (word >= static_cast<int64_t>(levels_[up].size())) return -1;
      const uint64_t rest = levels_[up][word] >> (value & 63);
      if (rest) {
        value += __builtin_ctzll(rest);
        while (up-- > 0) value = value << 6 | __builtin_ctzll(levels_[up][value]);
        return value;
      }
      value = word + 1;  // the words behind this one
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

struct Packing {
  std::vector<int32_t> placed;  // documents in the order in which they were placed
  std::vector<int32_t> bin;     // of placed[i]
  int64_t bins = 0;
};

// Lengths must lie in 1 .. capacity, and there must be fewer than 2**31.
template <class Length>
Packing best_fit(const Length* lengths, int64_t n, int64_t capacity) {
  Packing packing;
  packing.placed.resize(n);
  packing.bin.resize(n);
  std::vector<int64_t> place(capacity + 2, 0);  // a counting sort, the longest first
  for (int64_t i = 0; i < n; ++i) ++place[capacity - lengths[i] + 1];
  for (int64_t i = 1; i <= capacity; ++i) place[i] += place[i - 1];
  for (int64_t i = 0; i < n; ++i) packing.placed[place[capacity - lengths[i]]++] = static_cast<int32_t>(i);

  std::vector<int32_t> top(capacity + 1, -1);  // of the stack of bins that have this much room left
  std::vector<int32_t> below;                  // per bin: the next in its stack
  BitTree rooms(capacity + 1);                 // those whose stack is not empty
  for (int64_t i = 0; i < n; ++i) {
    const int64_t length = lengths[packing.placed[i]];
    int64_t room = rooms.at_least(length);
    int32_t bin;
    if (room < 0) {
      room = capacity;
      bin = static_cast<int32_t>(packing.bins++);
      below.push_back(-1);
    } else {
      bin = top[room];
      top[room] = below[bin];
      if (top[room] < 0) rooms.erase(room);
    }
    packing.bin[i] = bin;
    const int64_t left = room - length;
    if (left) {
      if (top[left] < 0) rooms.insert(left);
      below[bin] = top[left];
      top[left] = bin;
    }
  }
  return packing;
}

}  // namespace soda
