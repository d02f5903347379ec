// Runs csrc's CUDA kernels on requests from standard input and answers on standard output, as ../test_emulated.py reads
// and writes them: a name of 8 bytes, how many numbers, int64 each, how many arrays, and of each its bytes and itself.
// Launches are as in csrc/cuda/ops.cu. Every array lies in memory of exactly its size.
#include <cuda_runtime.h>

#include <iostream>
#include <memory>
#include <string>

#include "batch.cuh"
#include "bits.cuh"

namespace {

using Array = std::unique_ptr<uint8_t[]>;

template <class Value>
Value read() {
  Value value;
  std::cin.read(reinterpret_cast<char*>(&value), sizeof(value));
  return value;
}

struct Request {
  std::vector<int64_t> numbers;
  std::vector<Array> arrays;
  std::vector<int64_t> sizes;

  template <class Value>
  const Value* in(int i) const {
    return reinterpret_cast<const Value*>(arrays[i].get());
  }
};

struct Answer {
  std::vector<Array> arrays;
  std::vector<int64_t> sizes;

  template <class Value>
  Value* make(int64_t count) {
    sizes.push_back(count * static_cast<int64_t>(sizeof(Value)));
    arrays.emplace_back(new uint8_t[sizes.back()]);
    memset(arrays.back().get(), 0xa5, sizes.back());
    return reinterpret_cast<Value*>(arrays.back().get());
  }

  unsigned long long* none_bad() {
    auto* bad = make<unsigned long long>(1);
    *bad = ~0ull;
    return bad;
  }
};

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

soda::Frames frames(const Request& r, int array, int64_t slots, int64_t bits) {
  return {r.in<uint8_t>(array), (slots * bits + 7) / 8, static_cast<uint32_t>(slots), static_cast<int>(bits)};
}

template <class Code>
void pack(const Request& r, Answer& a) {
  const int64_t seed = r.numbers[0], rows = r.numbers[1], slots = r.numbers[2], bits = r.numbers[3];
  const int64_t width = (slots * bits + 7) / 8;
  auto* packed = a.make<uint8_t>(rows * width);
  auto* bad = a.none_bad();
  emulated::launch(seed, blocks(rows * width, 4 * soda::kThreads), soda::kThreads, soda::pack_kernel<Code>,
                   r.in<Code>(0), static_cast<uint32_t>(width), static_cast<uint32_t>(slots), static_cast<int>(bits),
                   rows * width, packed, bad);
}

void unpack(const Request& r, Answer& a) {
  const int64_t seed = r.numbers[0], rows = r.numbers[1], slots = r.numbers[2], bits = r.numbers[3];
  emulated::launch(seed, blocks(rows * slots, 4 * soda::kThreads), soda::kThreads, soda::unpack_kernel,
                   frames(r, 0, slots, bits), rows * slots, a.make<int32_t>(rows * slots));
}

void batch(const Request& r, Answer& a) {
  const int64_t seed = r.numbers[0], rows = r.numbers[1], length = r.numbers[2], n = rows * length;
  const soda::BatchInput in{r.in<int32_t>(0), r.in<int64_t>(1), r.in<uint8_t>(2), r.sizes[2], r.in<float>(3),
                            r.sizes[3] / 4, r.numbers[3], r.numbers[4] != 0, length,
                            r.arrays.size() > 4 ? r.in<float>(4) : nullptr};
  soda::BatchOutput out{};
  out.tokens = a.make<int64_t>(n);
  out.labels = a.make<int64_t>(n);
  out.loss_weight = a.make<float>(n);
  out.class_id = a.make<int64_t>(n);
  out.segment_id = a.make<int64_t>(n);
  out.position_id = a.make<int64_t>(n);
  auto* facts = a.make<int4>(rows);
  Answer between;
  auto* starts = between.make<int32_t>(n);
  emulated::launch(seed, blocks(rows, 1), soda::kRowThreads, soda::batch_kernel, in, out, starts, facts);
  int64_t segments = 0;
  for (int64_t row = 0; row < rows; ++row) segments += facts[row].x;
  emulated::launch(seed, blocks(rows, 1), soda::kCompactThreads, soda::compact_kernel, starts, facts, length,
                   a.make<int32_t>(segments + 1));
}

bool answer_next() {
  char name[8];
  if (!std::cin.read(name, sizeof(name))) return false;
  Request r;
  r.numbers.resize(read<int64_t>());
  for (int64_t& number : r.numbers) number = read<int64_t>();
  r.sizes.resize(read<int64_t>());
  for (int64_t& size : r.sizes) {
    size = read<int64_t>();
    r.arrays.emplace_back(new uint8_t[size]);
    std::cin.read(reinterpret_cast<char*>(r.arrays.back().get()), size);
  }
  Answer a;
  const std::string what(name, strnlen(name, sizeof(name)));
  if (what == "pack16") pack<int16_t>(r, a);
  if (what == "pack32") pack<int32_t>(r, a);
  if (what == "unpack") unpack(r, a);
  if (what == "batch") batch(r, a);
  const auto count = static_cast<int64_t>(a.sizes.size());
  std::cout.write(reinterpret_cast<const char*>(&count), sizeof(count));
  for (int64_t i = 0; i < count; ++i) {
    std::cout.write(reinterpret_cast<const char*>(&a.sizes[i]), sizeof(int64_t));
    std::cout.write(reinterpret_cast<const char*>(a.arrays[i].get()), a.sizes[i]);
  }
  return true;
}

}  // namespace

int main() {
  while (answer_next()) {
  }
}
