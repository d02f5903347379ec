// The ops of megatron_soda and their CPU kernels, through libtorch's stable ABI.
#include "../glue.h"
#include "attend.h"
#include "automaton.h"
#include "batch.h"
#include "best_fit.h"
#include "bits.h"
#include "expand.h"
#include "hash.h"
#include "linear.h"

namespace soda {
namespace {

constexpr int64_t kVersion = 4;      // megatron_soda/ops/library.py wants this number
constexpr int64_t kGrain = 1 << 16;  // tokens that are worth a thread

template <class Function>
void in_parallel(int64_t n, int64_t tokens_each, const Function& function) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tokens_each)), function);
}

void lower(std::atomic<int64_t>& least, int64_t value) {
  int64_t known = least.load();
  while (value < known && !least.compare_exchange_weak(known, value)) {
  }
}

template <class Code>
void pack_as(const Tensor& codes, int64_t bits, Tensor& packed) {
  const int64_t frames = codes.size(0), slots = codes.size(1), width = packed.size(1);
  const Code* in = codes.const_data_ptr<Code>();
  uint8_t* out = packed.mutable_data_ptr<uint8_t>();
  std::atomic<bool> fits{true};
  in_parallel(frames, slots, [&](int64_t from, int64_t to) {
    if (!pack_frames(in + from * slots, to - from, slots, static_cast<int>(bits), out + from * width)) fits = false;
  });
  if (fits) return;
  for (int64_t i = 0; i < frames * slots; ++i)
    check(in[i] >= 0 && in[i] >> bits == 0, "codes[", i / slots, ", ", i % slots, "] is ", in[i], ", not in [0, ",
          1 << bits, ")");
}

Tensor pack(const Tensor& codes, int64_t bits) {
  check_tensor("codes", codes, 2, codes);
  check(1 <= bits && bits <= 24, "bits must be 1 to 24, not ", bits);
  Tensor packed = make(codes, {codes.size(0), frame_width(codes.size(1), bits)}, ScalarType::Byte);
  if (codes.scalar_type() == ScalarType::Short)
    pack_as<int16_t>(codes, bits, packed);
  else
    pack_as<int32_t>(codes, bits, packed);
  return packed;
}

Tensor unpack(const Tensor& packed, int64_t slots, int64_t bits) {
  check_tensor("packed", packed, 2, packed);
  check_bits("packed", packed, slots, bits);
  const int64_t width = packed.size(1);
  Tensor codes = make(packed, {packed.size(0), slots}, ScalarType::Int);
  const uint8_t* in = packed.const_data_ptr<uint8_t>();
  const uint8_t* end = in + packed.numel();
  int32_t* out = codes.mutable_data_ptr<int32_t>();
  in_parallel(packed.size(0), slots, [&](int64_t from, int64_t to) {
    unpack_frames(in + from * width, end, to - from, slots, static_cast<int>(bits), 0, 0, out + from * slots);
  });
  return codes;
}

Tensor expand(const Tensor& text, const Tensor& frames, const Tensor& starts, const Tensor& firsts,
              const Tensor& begins, int64_t length, int64_t slots, int64_t bits, int64_t text_bits,
              int64_t audio_base, int64_t entries) {
  check_stream(text, frames, starts, firsts, begins, length, slots, bits, text_bits);
  const Plane words{text.const_data_ptr<uint8_t>(), text.size(0), 8, static_cast<int>(text_bits), 0, 0};
  const Plane audio{frames.const_data_ptr<uint8_t>(),  frames.size(0),
                    slots,                             static_cast<int>(bits),
                    static_cast<uint32_t>(audio_base), static_cast<uint32_t>(entries)};
  const Stream stream{words, audio, starts.const_data_ptr<int64_t>(), firsts.const_data_ptr<int64_t>(),
                      starts.numel() - 1};
  const int64_t windows = begins.numel(), total = std::max<int64_t>(stream.total(), 0);
  const int64_t* begin = begins.const_data_ptr<int64_t>();
  for (int64_t w = 0; w < windows; ++w)
    if (begin[w] < 0 || begin[w] > total - length) fail_window(w, begin[w], length, total);
  Tensor ids = make(begins, {windows, length}, ScalarType::Int);
  int32_t* out = ids.mutable_data_ptr<int32_t>();
  std::atomic<int64_t> bad{windows};
  in_parallel(windows, length, [&](int64_t from, int64_t to) {
    for (int64_t w = from; w < to; ++w)
      if (!stream.read(begin[w], length, out + w * length)) return lower(bad, w);
  });
  if (bad < windows) fail_window(bad, begin[bad], length, total);
  return ids;
}

using Batch = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Batch build_batch(const Tensor& ids, const Tensor& counts, const Tensor& classes, const Tensor& weights, int64_t eos,
                  bool reset_positions, const std::optional<Tensor> label_weights) {
  check_batch(ids, counts, classes, weights, label_weights);
  const int64_t sequences = ids.size(0), length = ids.size(1) - 1;
  const auto row_major = [&](ScalarType type) { return make(ids, {sequences, length}, type); };
  Tensor tokens = row_major(ScalarType::Long), labels = row_major(ScalarType::Long);
  Tensor loss_weight = row_major(ScalarType::Float), class_id = row_major(ScalarType::Long);
  Tensor segment_id = row_major(ScalarType::Long), position_id = row_major(ScalarType::Long);
  const BatchTables tables{classes.const_data_ptr<uint8_t>(), classes.numel(), weights.const_data_ptr<float>(),
                           weights.numel(),                   eos,             reset_positions};
  const BatchRow rows{tokens.mutable_data_ptr<int64_t>(),     labels.mutable_data_ptr<int64_t>(),
                      loss_weight.mutable_data_ptr<float>(),  class_id.mutable_data_ptr<int64_t>(),
                      segment_id.mutable_data_ptr<int64_t>(), position_id.mutable_data_ptr<int64_t>()};
  const int32_t* in = ids.const_data_ptr<int32_t>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const float* weighed = label_weights ? label_weights->const_data_ptr<float>() : nullptr;
  std::vector<std::vector<int32_t>> starts(sequences);
  std::vector<RowFacts> facts(sequences);
  in_parallel(sequences, length, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s)
      facts[s] = build_row(in + s * (length + 1), length, count[s], weighed ? weighed + s * length : nullptr, tables,
                           rows.at(s * length), starts[s]);
  });
  RowFacts all = facts[0];
  int64_t segments = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    all = all.with(facts[s]);
    segments += static_cast<int64_t>(starts[s].size());
  }
  check_found(all.low, all.high, tables.vocabulary, all.top_class, tables.n_classes);
  Tensor cu_seqlens = make(ids, {segments + 1}, ScalarType::Int);
  int32_t* out = cu_seqlens.mutable_data_ptr<int32_t>();
  for (int64_t s = 0; s < sequences; ++s)
    for (const int32_t start : starts[s]) *out++ = static_cast<int32_t>(s * length + start);
  *out = static_cast<int32_t>(sequences * length);
  return {tokens, labels, loss_weight, class_id, segment_id, position_id, cu_seqlens};
}

template <class Length>
Packing pack_documents(const Tensor& lengths, int64_t capacity) {
  const Length* length = lengths.const_data_ptr<Length>();
  for (int64_t i = 0; i < lengths.numel(); ++i)
    check(1 <= length[i] && length[i] <= capacity, "lengths[", i, "] is ", length[i], ", not in 1 to ", capacity);
  return best_fit(length, lengths.numel(), capacity);
}

std::tuple<Tensor, Tensor> best_fit_op(const Tensor& lengths, int64_t capacity) {
  check_tensor("lengths", lengths, 1, lengths);
  check(1 <= capacity && capacity <= 1 << 24, "capacity must be 1 to 2**24, not ", capacity);
  const int64_t n = lengths.numel();
  check(n < int64_t{1} << 31, "lengths must have fewer than 2**31 elements");
  const Packing packing = lengths.scalar_type() == ScalarType::Int ? pack_documents<int32_t>(lengths, capacity)
                                                                   : pack_documents<int64_t>(lengths, capacity);
  Tensor order = make(lengths, {n}, ScalarType::Long), offsets = make(lengths, {packing.bins + 1}, ScalarType::Long);
  int64_t* out = order.mutable_data_ptr<int64_t>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  std::vector<int64_t> place(packing.bins + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++place[packing.bin[i] + 1];
  for (int64_t b = 0; b < packing.bins; ++b) place[b + 1] += place[b];
  std::copy(place.begin(), place.end(), offset);
  for (int64_t i = 0; i < n; ++i) out[place[packing.bin[i]]++] = packing.placed[i];
  return {order, offsets};
}

const int64_t* checked_offsets(const Tensor& offsets, const Tensor& ids) {
  check_tensor("offsets", offsets, 1, ids);
  check(offsets.numel() >= 1, "offsets must not be empty");
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  int64_t last = 0;
  for (int64_t d = 0; d < offsets.numel(); ++d) {
    check(last <= bounds[d] && bounds[d] <= ids.numel(), "offsets must never fall and lie within the ids");
    last = bounds[d];
  }
  return bounds;
}

Tensor first_illegal(const Tensor& ids, const Tensor& offsets, const Tensor& kinds, const Tensor& step, int64_t start,
                     int64_t end) {
  check_tensor("ids", ids, 1, ids);
  check_tensor("kinds", kinds, 1, ids);
  check_tensor("step", step, 2, ids);
  const int64_t* bounds = checked_offsets(offsets, ids);
  const int64_t documents = offsets.numel() - 1, states = step.size(0), n_kinds = step.size(1);
  check(1 <= states && states <= 127 && 1 <= n_kinds && n_kinds <= 127, "step must be (states, n_kinds), up to 127");
  check(0 <= start && start < states && 0 <= end && end < states, "start and end must be states");
  check(kinds.numel() < int64_t{1} << 31, "kinds is too long");
  const int8_t* kind = kinds.const_data_ptr<int8_t>();
  const int8_t* next = step.const_data_ptr<int8_t>();
  for (int64_t i = 0; i < kinds.numel(); ++i) check(0 <= kind[i] && kind[i] < n_kinds, "kinds[", i, "] is no kind");
  for (int64_t i = 0; i < step.numel(); ++i) check(next[i] < states, "step leads to a state that there is not");
  const Automaton automaton(kind, kinds.numel(), next, static_cast<int>(states), static_cast<int>(n_kinds),
                            static_cast<int>(start), static_cast<int>(end));
  Tensor found = make(ids, {documents}, ScalarType::Long);
  const int32_t* in = ids.const_data_ptr<int32_t>();
  int64_t* out = found.mutable_data_ptr<int64_t>();
  in_parallel(documents, ids.numel() / std::max<int64_t>(documents, 1), [&](int64_t from, int64_t to) {
    for (int64_t d = from; d < to; ++d) out[d] = automaton.first_illegal(in + bounds[d], bounds[d + 1] - bounds[d]);
  });
  return found;
}

Tensor hash_documents(const Tensor& ids, const Tensor& offsets) {
  check_tensor("ids", ids, 1, ids);
  const int64_t* bounds = checked_offsets(offsets, ids);
  const int64_t documents = offsets.numel() - 1;
  Tensor hashes = make(ids, {documents}, ScalarType::Long);
  const int32_t* in = ids.const_data_ptr<int32_t>();
  int64_t* out = hashes.mutable_data_ptr<int64_t>();
  in_parallel(documents, ids.numel() / std::max<int64_t>(documents, 1), [&](int64_t from, int64_t to) {
    for (int64_t d = from; d < to; ++d)
      out[d] = static_cast<int64_t>(hash_document(in + bounds[d], bounds[d + 1] - bounds[d]));
  });
  return hashes;
}

template <class Weight>
void linear_as(const Tensor& x, const Tensor& weight, Tensor& y) {
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  const float* vectors = x.const_data_ptr<float>();
  const auto* matrix = static_cast<const Weight*>(weight.data_ptr());
  float* found = y.mutable_data_ptr<float>();
  in_parallel(out, rows * in,
              [&](int64_t from, int64_t to) { linear(vectors, rows, in, matrix, from, to, found, out); });
}

Tensor linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor> scale) {
  check_tensor("x", x, 2, x);
  check_tensor("weight", weight, 2, x);
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  check(weight.size(1) == in && 1 <= in && in <= 1 << 22, "x and weight must have the same number of columns");
  check(x.scalar_type() == ScalarType::Float, "x must be float32");
  Tensor y = make(x, {rows, out}, ScalarType::Float);
  if (weight.scalar_type() == ScalarType::Float) {
    linear_as<float>(x, weight, y);
  } else if (weight.scalar_type() == ScalarType::BFloat16) {
    linear_as<BFloat16>(x, weight, y);
  } else {
    check(weight.scalar_type() == ScalarType::Char && scale, "int8 weights need a scale");
    check_tensor("scale", *scale, 1, x);
    check(scale->size(0) == out, "scale must have one entry per row of weight");
    const Quantised vectors(x.const_data_ptr<float>(), rows, in);
    const int8_t* matrix = weight.const_data_ptr<int8_t>();
    const float* factor = scale->const_data_ptr<float>();
    float* found = y.mutable_data_ptr<float>();
    in_parallel(out, rows * in,
                [&](int64_t from, int64_t to) { linear(vectors, rows, in, matrix, factor, from, to, found, out); });
  }
  return y;
}

const float* floats(const char* name, const Tensor& tensor, int64_t dimensions, const Tensor& like) {
  check_tensor(name, tensor, dimensions, like);
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return tensor.const_data_ptr<float>();
}

Tensor norm_and_rotate_op(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor> rotation) {
  const float* in = floats("x", x, 3, x);
  const float* by = floats("weight", weight, 1, x);
  const int64_t rows = x.size(0), heads = x.size(1), size = x.size(2);
  check(weight.size(0) == size && size >= 1, "weight must be as long as the last dimension of x");
  const float* turn = rotation ? floats("rotation", *rotation, 3, x) : nullptr;
  check(!turn || (rotation->size(0) == 2 && rotation->size(1) == rows && rotation->size(2) == size && size % 2 == 0),
        "rotation must be (2, rows, size), with an even size");
  Tensor y = make(x, {rows, heads, size}, ScalarType::Float);
  float* out = y.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows * heads; ++i) {
    const float* cosine = turn ? turn + i / heads * size : nullptr;
    norm_and_rotate(in + i * size, size, by, static_cast<float>(eps), cosine, turn ? cosine + rows * size : nullptr,
                    out + i * size);
  }
  return y;
}

Tensor attend_op(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values,
                 const Tensor& lengths, int64_t longest) {
  const float* queries = floats("q", q, 3, q);
  const float* key = floats("k", k, 3, q);
  const float* value = floats("v", v, 3, q);
  floats("keys", keys, 4, q);
  floats("values", values, 4, q);
  check_tensor("lengths", lengths, 1, q);
  const int64_t rows = q.size(0), heads = q.size(1), size = q.size(2), groups = k.size(1), room = keys.size(2);
  check(groups >= 1 && heads % groups == 0, "the heads must share the groups evenly");
  check(lengths.size(0) == rows && lengths.scalar_type() == ScalarType::Long, "lengths must be int64 (rows,)");
  for (const Tensor& one : {k, v})
    check(one.size(0) == rows && one.size(1) == groups && one.size(2) == size, "k and v must be (rows, groups, size)");
  for (const Tensor& one : {keys, values})
    check(one.size(0) == rows && one.size(1) == groups && one.size(2) == room && one.size(3) == size,
          "keys and values must be (rows, groups, room, size)");
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  check(longest <= room, "the cache has room for ", room, " tokens, not for ", longest);
  for (int64_t r = 0; r < rows; ++r) check(0 <= length[r] && length[r] < longest, "lengths must be below longest");
  Tensor y = make(q, {rows, heads * size}, ScalarType::Float);
  float* all_keys = keys.mutable_data_ptr<float>();
  float* all_values = values.mutable_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const int64_t shared = heads / groups;
  in_parallel(rows * groups, 2 * longest * size * shared, [&](int64_t from, int64_t to) {
    std::vector<float> scores(shared * longest);
    for (int64_t i = from; i < to; ++i) {
      float* own_keys = all_keys + i * room * size;
      float* own_values = all_values + i * room * size;
      const int64_t at = length[i / groups];
      std::copy_n(key + i * size, size, own_keys + at * size);
      std::copy_n(value + i * size, size, own_values + at * size);
      attend(queries + i * shared * size, shared, own_keys, own_values, at + 1, size, scores.data(),
             out + i * shared * size);
    }
  });
  return y;
}

int64_t version() { return kVersion; }

void set_simd(bool on) { simd_allowed = on; }

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY(megatron_soda, m) {
  m.def("version() -> int");
  m.def("set_simd(bool on) -> ()");
  m.def("pack_frames(Tensor codes, int bits) -> Tensor");
  m.def("unpack_frames(Tensor packed, int slots, int bits) -> Tensor");
  m.def(
      "expand_windows(Tensor text, Tensor frames, Tensor starts, Tensor firsts, Tensor begins, int length, int slots, "
      "int bits, int text_bits, int audio_base, int entries) -> Tensor");
  m.def(
      "build_batch(Tensor ids, Tensor counts, Tensor classes, Tensor weights, int eos, bool reset_positions, "
      "Tensor? label_weights) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("best_fit(Tensor lengths, int capacity) -> (Tensor, Tensor)");
  m.def("first_illegal(Tensor ids, Tensor offsets, Tensor kinds, Tensor step, int start, int end) -> Tensor");
  m.def("hash_documents(Tensor ids, Tensor offsets) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale) -> Tensor");
  m.def("norm_and_rotate(Tensor x, Tensor weight, float eps, Tensor? rotation) -> Tensor");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, int longest) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_soda, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&soda::version));
  m.impl("set_simd", TORCH_BOX(&soda::set_simd));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_soda, CPU, m) {
  m.impl("pack_frames", TORCH_BOX(&soda::pack));
  m.impl("unpack_frames", TORCH_BOX(&soda::unpack));
  m.impl("expand_windows", TORCH_BOX(&soda::expand));
  m.impl("build_batch", TORCH_BOX(&soda::build_batch));
  m.impl("best_fit", TORCH_BOX(&soda::best_fit_op));
  m.impl("first_illegal", TORCH_BOX(&soda::first_illegal));
  m.impl("hash_documents", TORCH_BOX(&soda::hash_documents));
  m.impl("linear", TORCH_BOX(&soda::linear_op));
  m.impl("norm_and_rotate", TORCH_BOX(&soda::norm_and_rotate_op));
  m.impl("attend", TORCH_BOX(&soda::attend_op));
}
