// The CUDA kernels behind the ops of megatron_soda, through libtorch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../glue.h"
#include "batch.cuh"
#include "bits.cuh"

namespace soda {
namespace {

constexpr unsigned long long kNone = ~0ull;  // no code is bad

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The device of a tensor and torch's stream on it, as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  template <class Value>
  void fetch(Value* to, const void* from, int64_t count = 1) const {  // and waits for it
    check_cuda(cudaMemcpyAsync(to, from, count * sizeof(Value), cudaMemcpyDeviceToHost, stream_));
    check_cuda(cudaStreamSynchronize(stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

unsigned blocks(int64_t n, int64_t each) {
  const int64_t count = (n + each - 1) / each;
  check(count < int64_t{1} << 31, "too large for one kernel: ", n, " elements");
  return static_cast<unsigned>(count);
}

Tensor none_bad(const Tensor& like, const OnDevice& device) {
  Tensor bad = make(like, {1}, ScalarType::Long);
  check_cuda(cudaMemsetAsync(bad.mutable_data_ptr(), 0xff, sizeof(kNone), device.stream()));
  return bad;
}

template <class Code>
void pack_as(const Tensor& codes, int64_t bits, Tensor& packed, const OnDevice& device) {
  const int64_t slots = codes.size(1), bytes = packed.numel();
  if (bytes == 0) return;
  Tensor bad = none_bad(codes, device);
  const Code* in = codes.const_data_ptr<Code>();
  pack_kernel<Code><<<blocks(bytes, 4 * kThreads), kThreads, 0, device.stream()>>>(
      in, static_cast<uint32_t>(packed.size(1)), static_cast<uint32_t>(slots), static_cast<int>(bits), bytes,
      packed.mutable_data_ptr<uint8_t>(), static_cast<unsigned long long*>(bad.mutable_data_ptr()));
  check_cuda(cudaGetLastError());
  unsigned long long first = kNone;
  device.fetch(&first, bad.const_data_ptr());
  if (first == kNone) return;
  Code code = 0;
  device.fetch(&code, in + first);
  fail("codes[", first / slots, ", ", first % slots, "] is ", code, ", not in [0, ", 1 << bits, ")");
}

Tensor pack(const Tensor& codes, int64_t bits) {
  check_tensor("codes", codes, 2, codes);
  check(1 <= bits && bits <= 24, "bits must be 1 to 24, not ", bits);
  check(codes.size(1) <= 1 << 24, "codes has more than 2**24 slots");
  const OnDevice device(codes);
  Tensor packed = make(codes, {codes.size(0), (codes.size(1) * bits + 7) / 8}, ScalarType::Byte);
  if (codes.scalar_type() == ScalarType::Short)
    pack_as<int16_t>(codes, bits, packed, device);
  else
    pack_as<int32_t>(codes, bits, packed, device);
  return packed;
}

Frames frames_of(const Tensor& packed, int64_t slots, int64_t bits) {
  return {packed.const_data_ptr<uint8_t>(), packed.size(1), static_cast<uint32_t>(slots), static_cast<int>(bits)};
}

Tensor unpack(const Tensor& packed, int64_t slots, int64_t bits) {
  check_tensor("packed", packed, 2, packed);
  check_bits("packed", packed, slots, bits);
  const OnDevice device(packed);
  Tensor codes = make(packed, {packed.size(0), slots}, ScalarType::Int);
  if (codes.numel() == 0) return codes;
  unpack_kernel<<<blocks(codes.numel(), 4 * kThreads), kThreads, 0, device.stream()>>>(
      frames_of(packed, slots, bits), codes.numel(), codes.mutable_data_ptr<int32_t>());
  check_cuda(cudaGetLastError());
  return codes;
}

using Batch = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Batch build_batch(const Tensor& ids, const Tensor& counts, const Tensor& classes, const Tensor& weights, int64_t eos,
                  bool reset_positions, const std::optional<Tensor> label_weights) {
  check_batch(ids, counts, classes, weights, label_weights);
  const OnDevice device(ids);
  const int64_t sequences = ids.size(0), length = ids.size(1) - 1;
  const auto row_major = [&](ScalarType type) { return make(ids, {sequences, length}, type); };
  Tensor tokens = row_major(ScalarType::Long), labels = row_major(ScalarType::Long);
  Tensor loss_weight = row_major(ScalarType::Float), class_id = row_major(ScalarType::Long);
  Tensor segment_id = row_major(ScalarType::Long), position_id = row_major(ScalarType::Long);
  Tensor starts = row_major(ScalarType::Int), facts = make(ids, {sequences, 4}, ScalarType::Int);
  const BatchInput in{ids.const_data_ptr<int32_t>(),
                      counts.const_data_ptr<int64_t>(),
                      classes.const_data_ptr<uint8_t>(),
                      classes.numel(),
                      weights.const_data_ptr<float>(),
                      weights.numel(),
                      eos,
                      reset_positions,
                      length,
                      label_weights ? label_weights->const_data_ptr<float>() : nullptr};
  const BatchOutput out{tokens.mutable_data_ptr<int64_t>(),     labels.mutable_data_ptr<int64_t>(),
                        loss_weight.mutable_data_ptr<float>(),  class_id.mutable_data_ptr<int64_t>(),
                        segment_id.mutable_data_ptr<int64_t>(), position_id.mutable_data_ptr<int64_t>()};
  int4* rows = static_cast<int4*>(facts.mutable_data_ptr());
  batch_kernel<<<blocks(sequences, 1), kRowThreads, 0, device.stream()>>>(in, out, starts.mutable_data_ptr<int32_t>(),
                                                                          rows);
  check_cuda(cudaGetLastError());
  std::vector<int4> found(sequences);
  device.fetch(found.data(), rows, sequences);
  int64_t segments = 0;
  int4 all = found[0];
  for (const int4& row : found) {
    segments += row.x;
    all.y = std::min(all.y, row.y);
    all.z = std::max(all.z, row.z);
    all.w = std::max(all.w, row.w);
  }
  check_found(all.y, all.z, in.vocabulary, all.w, in.n_classes);
  Tensor cu_seqlens = make(ids, {segments + 1}, ScalarType::Int);
  compact_kernel<<<blocks(sequences, 1), kCompactThreads, 0, device.stream()>>>(
      starts.const_data_ptr<int32_t>(), rows, length, cu_seqlens.mutable_data_ptr<int32_t>());
  check_cuda(cudaGetLastError());
  return {tokens, labels, loss_weight, class_id, segment_id, position_id, cu_seqlens};
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(megatron_soda, CUDA, m) {
  m.impl("pack_frames", TORCH_BOX(&soda::pack));
  m.impl("unpack_frames", TORCH_BOX(&soda::unpack));
  m.impl("build_batch", TORCH_BOX(&soda::build_batch));
}
