// What the glue of the CPU and the CUDA ops share: errors and checks.
// Python has checked the arguments already; here only what could lead outside a tensor is checked again.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace soda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python turns errors of this prefix into ValueError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "megatron_soda: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

inline void check_tensor(const char* name, const Tensor& tensor, int64_t dimensions, const Tensor& like) {
  check(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions");
  check(tensor.is_contiguous(), name, " must be contiguous");
  check(tensor.device() == like.device(), name, " is on another device");
}

inline void check_bits(const char* name, const Tensor& packed, int64_t slots, int64_t bits) {
  check(1 <= bits && bits <= 24, "bits must be 1 to 24, not ", bits);
  check(1 <= slots && slots <= 1 << 24, "slots must be 1 to 2**24, not ", slots);
  check(packed.size(1) == (slots * bits + 7) / 8, name, " is not as wide as its frames");
}

// Arguments of expand_windows, but for the pointers' targets: those are checked as they are read.
inline void check_stream(const Tensor& text, const Tensor& frames, const Tensor& starts, const Tensor& firsts,
                         const Tensor& begins, int64_t length, int64_t slots, int64_t bits, int64_t text_bits) {
  check_tensor("text", text, 2, text);
  check_tensor("frames", frames, 2, text);
  check_tensor("starts", starts, 1, text);
  check_tensor("firsts", firsts, 1, text);
  check_tensor("begins", begins, 1, text);
  check_bits("frames", frames, slots, bits);
  check_bits("text", text, 8, text_bits);
  check(length >= 1, "length must be 1 or more, not ", length);
  check(starts.numel() >= 1 && starts.numel() == firsts.numel(), "starts and firsts must be equally long");
}

inline void check_batch(const Tensor& ids, const Tensor& counts, const Tensor& classes, const Tensor& weights,
                        const std::optional<Tensor>& label_weights) {
  check_tensor("ids", ids, 2, ids);
  check_tensor("counts", counts, 1, ids);
  check_tensor("classes", classes, 1, ids);
  check_tensor("weights", weights, 1, ids);
  check(ids.size(0) >= 1 && ids.size(1) >= 2 && ids.numel() < int64_t{1} << 30, "ids has a wrong shape");
  check(counts.numel() == ids.size(0), "counts must have one entry for every sequence");
  if (!label_weights) return;
  check_tensor("label_weights", *label_weights, 2, ids);
  check(label_weights->size(0) == ids.size(0) && label_weights->size(1) == ids.size(1) - 1,
        "label_weights must have one entry for every label");
}

inline void check_found(int64_t low, int64_t high, int64_t vocabulary, int64_t top_class, int64_t n_classes) {
  check(low >= 0 && high < vocabulary, "ids must lie in [0, ", vocabulary, "), found ", low, " to ", high);
  check(top_class < n_classes, "classes must lie in [0, ", n_classes, "), the number of weights; found ", top_class);
}

[[noreturn]] inline void fail_window(int64_t window, int64_t begin, int64_t length, int64_t total) {
  if (begin < 0 || begin > total - length)
    fail("window ", window, ": ", length, " tokens from token ", begin, " on are not within the ", total, " tokens");
  fail("window ", window, ": its runs lead outside the tables or the planes: the data are damaged");
}

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
}

}  // namespace soda
