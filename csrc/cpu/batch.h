// A window of ids into a row of every tensor of a batch, in one pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace soda {

struct BatchTables {
  const uint8_t* classes;
  int64_t vocabulary;
  const float* weights;
  int64_t n_classes;
  int64_t eos;
  bool reset_positions;
};

struct BatchRow {
  int64_t* tokens;
  int64_t* labels;
  float* loss_weight;
  int64_t* class_id;
  int64_t* segment_id;
  int64_t* position_id;

  BatchRow at(int64_t offset) const {
    return {tokens + offset,   labels + offset,     loss_weight + offset,
            class_id + offset, segment_id + offset, position_id + offset};
  }
};

struct RowFacts {
  int32_t low, high;  // of the ids
  int32_t top_class;

  RowFacts with(const RowFacts& other) const {
    return {std::min(low, other.low), std::max(high, other.high), std::max(top_class, other.top_class)};
  }
};

// `label_weights`: of every label, or null. `starts` gets where the row's segments begin. Its loops are the compiler's to vectorise, for either set of instructions.
__attribute__((always_inline)) inline RowFacts build_row_with(const int32_t* ids, int64_t length, int64_t count,
                                                              const float* label_weights, const BatchTables& tables, const BatchRow& row,
                                                              std::vector<int32_t>& starts) {
  RowFacts facts{ids[0], ids[0], 0};
  for (int64_t p = 1; p <= length; ++p) {
    facts.low = std::min(facts.low, ids[p]);
    facts.high = std::max(facts.high, ids[p]);
  }
  if (facts.low < 0 || facts.high >= tables.vocabulary) return facts;
  for (int64_t p = 0; p < length; ++p) {
    row.tokens[p] = ids[p];
    row.labels[p] = ids[p + 1];
  }
  for (int64_t p = 0; p < length; ++p) {
    const int32_t id_class = tables.classes[ids[p + 1]];
    facts.top_class = std::max(facts.top_class, id_class);
    row.class_id[p] = id_class;
    row.loss_weight[p] = p < count && id_class < tables.n_classes ? tables.weights[id_class] : 0.0f;
  }
  if (label_weights)
    for (int64_t p = 0; p < length; ++p) row.loss_weight[p] = p < count ? row.loss_weight[p] * label_weights[p] : 0.0f;
  starts.push_back(0);
  for (int64_t from = 0; from < length;) {  // a segment a round: up to its EOS, or to the end
    int64_t to = from;
    while (to < length && ids[to] != tables.eos) ++to;
    to = std::min(to + 1, length);
    const int64_t segment = static_cast<int64_t>(starts.size()) - 1, origin = tables.reset_positions ? from : 0;
    for (int64_t p = from; p < to; ++p) {
      row.segment_id[p] = segment;
      row.position_id[p] = p - origin;
    }
    if (to < length) starts.push_back(static_cast<int32_t>(to));
    from = to;
  }
  return facts;
}

#ifdef SODA_AVX2
__attribute__((target("avx2"))) inline RowFacts build_row_avx2(const int32_t* ids, int64_t length, int64_t count,
                                                               const float* label_weights, const BatchTables& tables, const BatchRow& row,
                                                               std::vector<int32_t>& starts) {
  return build_row_with(ids, length, count, label_weights, tables, row, starts);
}
#endif

inline RowFacts build_row(const int32_t* ids, int64_t length, int64_t count, const float* label_weights,
                          const BatchTables& tables, const BatchRow& row, std::vector<int32_t>& starts) {
#ifdef SODA_AVX2
  if (use_avx2()) return build_row_avx2(ids, length, count, label_weights, tables, row, starts);
#endif
  return build_row_with(ids, length, count, label_weights, tables, row, starts);
}

}  // namespace soda
