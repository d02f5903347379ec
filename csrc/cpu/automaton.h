// A finite automaton over kinds of ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace soda {

// A step depends on the one before, so the time of a table look-up bounds the speed. Where the table of all pairs of
// kinds is small enough for the first-level cache, one look-up takes two tokens.
class Automaton {
 public:
  // kinds[id] must be in [0, n_kinds) and step[state, kind] below states, or negative: illegal.
  Automaton(const int8_t* kinds, int64_t vocabulary, const int8_t* step, int states, int n_kinds, int start, int end)
      : kinds_(kinds, kinds + vocabulary), vocabulary_(static_cast<uint32_t>(vocabulary)), dead_(states) {
    while ((1 << shift_) < n_kinds + 1) ++shift_;
    kinds_.push_back(static_cast<int8_t>(n_kinds));  // of every id outside the vocabulary: illegal everywhere
    const int columns = 1 << shift_;
    one_.assign((states + 1) << shift_, dead_);
    for (int s = 0; s < states; ++s)
      for (int k = 0; k < n_kinds; ++k)
        if (step[s * n_kinds + k] >= 0) one_[(s << shift_) + k] = step[s * n_kinds + k];
    start_ = start, end_ = end;
    if (static_cast<int64_t>(one_.size()) * columns * sizeof(uint16_t) > 32768) return;
    two_.resize(one_.size() * columns);
    for (int s = 0; s <= states; ++s)
      for (int a = 0; a < columns; ++a)
        for (int b = 0; b < columns; ++b)
          two_[(((s << shift_) + a) << shift_) + b] = one_[(one_[(s << shift_) + a] << shift_) + b] << 2 * shift_;
  }

  // -1: legal and ends in `end`; else the first illegal token, or the length if it ends in another state.
  int64_t first_illegal(const int32_t* ids, int64_t length) const {
    constexpr int64_t block = 64;  // the dead state has no way out, so it is enough to look for it now and then
    int state = start_;
    for (int64_t from = 0; from < length; from += block) {
      const int64_t to = std::min(from + block, length);
      const int before = state;
      state = two_.empty() ? run(before, ids, from, to) : run_pairs(before, ids, from, to);
      if (state != dead_) continue;
      state = before;
      for (int64_t p = from; p < to; ++p) {
        state = run(state, ids, p, p + 1);
        if (state == dead_) return p;
      }
    }
    return state == end_ ? -1 : length;
  }

 private:
  unsigned kind(int32_t id) const {
    return static_cast<uint8_t>(kinds_[std::min(static_cast<uint32_t>(id), vocabulary_)]);
  }

  int run(int state, const int32_t* ids, int64_t from, int64_t to) const {
    for (; from < to; ++from) state = one_[(state << shift_) + kind(ids[from])];
    return state;
  }

  int run_pairs(int state, const int32_t* ids, int64_t from, int64_t to) const {
    unsigned row = static_cast<unsigned>(state) << 2 * shift_;
    for (; from + 2 <= to; from += 2) row = two_[row + (kind(ids[from]) << shift_) + kind(ids[from + 1])];
    return run(static_cast<int>(row >> 2 * shift_), ids, from, to);
  }

  std::vector<int8_t> kinds_;
  uint32_t vocabulary_;
  int dead_, start_ = 0, end_ = 0, shift_ = 0;
  std::vector<uint16_t> one_;  // the next state by (state, kind)
  std::vector<uint16_t> two_;  // by (state, kind, kind); holds the next row, which saves a shift
};

}  // namespace soda
