// Windows of ids into the tensors of a batch on a device; ../cpu/batch.h does the same.
//
// A block makes a row, two tokens a thread and a tile of the row at a time. Where segments begin is a running count and
// a running maximum over the row: a scan in warps, then over the warps, then carried from tile to tile.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace soda {

constexpr int kRowThreads = 1024, kWarps = kRowThreads / 32, kCompactThreads = 256;

struct BatchInput {
  const int32_t* ids;  // (sequences, length + 1)
  const int64_t* counts;
  const uint8_t* classes;
  int64_t vocabulary;
  const float* weights;
  int64_t n_classes;
  int64_t eos;
  bool reset_positions;
  int64_t length;
  const float* label_weights;  // (sequences, length), or null
};

struct BatchOutput {
  int64_t* tokens;
  int64_t* labels;
  float* loss_weight;
  int64_t* class_id;
  int64_t* segment_id;
  int64_t* position_id;
};

struct Scan {
  int32_t segments, origin;  // segment starts so far, and the last of them
};

__device__ inline Scan join(Scan a, Scan b) { return {a.segments + b.segments, max(a.origin, b.origin)}; }

__device__ inline Scan scan_warp(Scan value) {  // inclusive
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Scan before = {__shfl_up_sync(~0u, value.segments, step), __shfl_up_sync(~0u, value.origin, step)};
    if (lane >= step) value = join(before, value);
  }
  return value;
}

// Stores for positions p and p + 1 of a row; one vector if both are there, for p begins where a vector does.
template <class Vector, class Value>
__device__ inline void store(Value* out, bool first, bool second, Value a, Value b) {
  if (first && second) {
    *reinterpret_cast<Vector*>(out) = Vector{a, b};
  } else {
    if (first) out[0] = a;
    if (second) out[1] = b;
  }
}

// facts[row] = segments, least id, greatest id, greatest class. starts[row * length + s] = where segment s of the row
// begins, in the flattened batch.
__global__ void __launch_bounds__(kRowThreads)
    batch_kernel(BatchInput in, BatchOutput out, int32_t* starts, int4* facts) {
  __shared__ Scan of_warp[kWarps];
  __shared__ int3 found[kWarps];
  const int64_t row = blockIdx.x, base = row * in.length, count = in.counts[row];
  const int32_t* ids = in.ids + row * (in.length + 1);
  const int length = static_cast<int>(in.length), warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  Scan carry = {0, 0};
  int low = INT_MAX, high = INT_MIN, top = 0;

  for (int tile = -static_cast<int>(base & 1); tile < length; tile += 2 * kRowThreads) {
    const int p = tile + 2 * static_cast<int>(threadIdx.x);
    const bool there[2] = {p >= 0 && p < length, p + 1 < length};
    int32_t id[4] = {0, 0, 0, 0};  // of positions p - 1 to p + 2
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = p - 1 + i;
      if (at < 0 || at > length) continue;
      id[i] = ids[at];
      low = min(low, id[i]);
      high = max(high, id[i]);
    }
    const bool starts_here[2] = {there[0] && p >= 1 && id[0] == in.eos, there[1] && p + 1 >= 1 && id[1] == in.eos};

    const Scan own = {starts_here[0] + starts_here[1], starts_here[1] ? p + 1 : starts_here[0] ? p : 0};
    const Scan inclusive = scan_warp(own);
    Scan before = {__shfl_up_sync(~0u, inclusive.segments, 1), __shfl_up_sync(~0u, inclusive.origin, 1)};
    if (lane == 0) before = {0, 0};
    if (lane == 31) of_warp[warp] = inclusive;
    __syncthreads();
    if (warp == 0) of_warp[lane] = scan_warp(of_warp[lane]);
    __syncthreads();
    before = join(carry, warp ? join(of_warp[warp - 1], before) : before);
    carry = join(carry, of_warp[kWarps - 1]);
    __syncthreads();  // all have read of_warp before the next tile writes it

    int64_t class_id[2];
    float weight[2];
    int segment[2], origin[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t label = id[2 + i];
      const bool known = label >= 0 && label < in.vocabulary;
      class_id[i] = there[i] && known ? in.classes[label] : 0;
      top = max(top, static_cast<int>(class_id[i]));
      const bool counts = there[i] && p + i < count && class_id[i] < in.n_classes;
      weight[i] = counts ? in.weights[class_id[i]] : 0.0f;
      if (counts && in.label_weights) weight[i] *= in.label_weights[base + p + i];
      segment[i] = (i ? segment[0] : before.segments) + starts_here[i];
      origin[i] = starts_here[i] ? p + i : i ? origin[0] : before.origin;
      if (there[i] && (starts_here[i] || p + i == 0)) starts[base + segment[i]] = static_cast<int32_t>(base + p + i);
    }
    const int64_t at = base + p;
    const auto both = [&](int64_t* to, int64_t a, int64_t b) { store<longlong2>(to + at, there[0], there[1], a, b); };
    both(out.tokens, id[1], id[2]);
    both(out.labels, id[2], id[3]);
    both(out.class_id, class_id[0], class_id[1]);
    both(out.segment_id, segment[0], segment[1]);
    both(out.position_id, p - (in.reset_positions ? origin[0] : 0), p + 1 - (in.reset_positions ? origin[1] : 0));
    store<float2>(out.loss_weight + at, there[0], there[1], weight[0], weight[1]);
  }

#pragma unroll
  for (int step = 16; step; step /= 2) {
    low = min(low, __shfl_xor_sync(~0u, low, step));
    high = max(high, __shfl_xor_sync(~0u, high, step));
    top = max(top, __shfl_xor_sync(~0u, top, step));
  }
  if (lane == 0) found[warp] = make_int3(low, high, top);
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) {
    low = min(low, found[w].x);
    high = max(high, found[w].y);
    top = max(top, found[w].z);
  }
  facts[row] = make_int4(carry.segments + 1, low, high, top);
}

// The segment starts of all rows without the gaps between them, and the end of the batch. A block copies a row.
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const int32_t* starts, const int4* facts, int64_t length, int32_t* cu_seqlens) {
  __shared__ int sums[kCompactThreads / 32];
  const int64_t row = blockIdx.x;
  int before = 0;
  for (int64_t r = threadIdx.x; r < row; r += kCompactThreads) before += facts[r].x;
#pragma unroll
  for (int step = 16; step; step /= 2) before += __shfl_xor_sync(~0u, before, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = before;
  __syncthreads();
  before = 0;
  for (const int sum : sums) before += sum;
  const int count = facts[row].x;
  for (int s = threadIdx.x; s < count; s += kCompactThreads) cu_seqlens[before + s] = starts[row * length + s];
  if (threadIdx.x == 0 && row == gridDim.x - 1)
    cu_seqlens[before + count] = static_cast<int32_t>((row + 1) * length);
}

}  // namespace soda
