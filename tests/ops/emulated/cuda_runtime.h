// What csrc/cuda/*.cuh take from CUDA, for a C++ compiler: the kernels run on the CPU, one block at a time.
//
// A thread of a block is a fiber. It runs until it needs others (a barrier, or a warp's exchange) or ends; whose turn is
// next is drawn from a seed, so that results which depend on the order differ from seed to seed, and at times warps go
// on to the next barrier one after the other. What a device leaves
// undefined is an error here: exchanges that not all lanes of the warp reach, or that reach different ones, and barriers
// that not all threads reach. Shared memory holds garbage when a block begins. Compiled with -fsanitize=address,undefined,
// accesses outside a buffer and vectors that are not aligned are errors, too.
#pragma once

#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("soda_shared")))

struct int3 {
  int x, y, z;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3_ {
  unsigned x = 0, y = 0, z = 0;
};

inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
template <class A>
int4 make_int4(A x, A y, A z, A w) {
  return {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z), static_cast<int>(w)};
}
using std::max;
using std::min;

inline dim3_ threadIdx, blockIdx, gridDim;
extern "C" char __start_soda_shared[] __attribute__((weak)), __stop_soda_shared[] __attribute__((weak));

namespace emulated {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 << 10;

[[noreturn]] inline void refuse(const char* what) {
  fprintf(stderr, "thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, what);
  abort();
}

// libc's own: the sanitizer's clears the stacks' shadows each time, which takes longer than most kernels do.
[[noreturn]] inline void jump(jmp_buf to) {
  static const auto libc = reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  libc(to, 1);
  abort();
}

enum class Waits { kNot, kForWarp, kForBlock, kForever };

struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  bool begun = false;
  char* stack = nullptr;
  void* sanitizers = nullptr;
  Waits waits = Waits::kNot;
};

struct Warp {
  uint64_t given[kLanes], taken[kLanes];
  int operation[kLanes];
};

class Block {
 public:
  static Block& of_now() {
    static Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& kernel, std::mt19937& order) {
    kernel_ = &kernel;
    while (fibers_.size() < threads) fibers_.emplace_back().stack = static_cast<char*>(aligned_alloc(64, kStack));
    threads_ = threads;
    warps_.assign((threads + kLanes - 1) / kLanes, {});
    spoil_shared_memory();
    std::vector<unsigned> turns(threads);
    for (unsigned t = 0; t < threads; ++t) {
      turns[t] = t;
      begin(fibers_[t]);
    }
    for (;;) {
      std::shuffle(turns.begin(), turns.end(), order);
      const bool warp_by_warp = order() & 1;
      bool ran = false;
      for (const unsigned t : turns) {
        ran |= run_once(t);
        while (warp_by_warp && run_warp(t / kLanes)) continue;
      }
      if (!ran && !release_block()) return;
    }
  }

  // Gives a value and returns those of all lanes of the warp, once all have given theirs.
  const uint64_t* exchange(unsigned mask, uint64_t value, int operation) {
    if (mask != ~0u) refuse("an exchange among some lanes is not emulated");
    Warp& warp = warps_[threadIdx.x / kLanes];
    warp.given[threadIdx.x % kLanes] = value;
    warp.operation[threadIdx.x % kLanes] = operation;
    pause(Waits::kForWarp);
    return warp.taken;
  }

  void pause(Waits why) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.waits = why;
    __sanitizer_start_switch_fiber(why == Waits::kForever ? nullptr : &fiber.sanitizers, main_stack_, main_size_);
    if (_setjmp(fiber.place) == 0) jump(main_);
    __sanitizer_finish_switch_fiber(fiber.sanitizers, nullptr, nullptr);
  }

 private:
  __attribute__((no_sanitize("address", "undefined"))) static void spoil_shared_memory() {
    for (volatile char* at = __start_soda_shared; at < __stop_soda_shared; ++at) *at = static_cast<char>(0xa5);
  }

  __attribute__((no_sanitize("address", "undefined"))) static void main_of_fiber() {
    Block& block = of_now();
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_size_);
    (*block.kernel_)();
    block.pause(Waits::kForever);
  }

  void begin(Fiber& fiber) {
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack;
    fiber.beginning.uc_stack.ss_size = kStack;
    fiber.beginning.uc_link = nullptr;
    fiber.begun = false;
    fiber.waits = Waits::kNot;
    makecontext(&fiber.beginning, &Block::main_of_fiber, 0);
  }

  void resume(unsigned thread) {
    threadIdx.x = thread;
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fibers_[thread].stack, kStack);
    if (_setjmp(main_) == 0) {
      Fiber& fiber = fibers_[thread];
      if (fiber.begun) jump(fiber.place);
      fiber.begun = true;
      setcontext(&fiber.beginning);
    }
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
  }

  bool run_once(unsigned thread) {
    if (fibers_[thread].waits != Waits::kNot) return false;
    resume(thread);
    release_warp(thread / kLanes);
    return true;
  }

  bool run_warp(unsigned number) {
    bool ran = false;
    for (unsigned t = number * kLanes; t < threads_ && t < (number + 1) * kLanes; ++t) ran |= run_once(t);
    return ran;
  }

  // Once every lane waits for the warp.
  void release_warp(unsigned number) {
    const unsigned first = number * kLanes;
    unsigned there = 0;
    for (unsigned lane = 0; lane < kLanes && first + lane < threads_; ++lane)
      there += fibers_[first + lane].waits == Waits::kForWarp;
    if (there < kLanes) return;
    Warp& warp = warps_[number];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (warp.operation[lane] != warp.operation[0]) refuse("lanes of this warp are at different exchanges");
      fibers_[first + lane].waits = Waits::kNot;
    }
    memcpy(warp.taken, warp.given, sizeof(warp.given));
  }

  // Nobody can go on: all must be at the barrier, or have ended. False: all have ended.
  bool release_block() {
    bool at_barrier = false;
    for (unsigned t = 0; t < threads_; ++t) {
      threadIdx.x = t;
      if (fibers_[t].waits == Waits::kForWarp) refuse("waits for lanes of its warp that never come");
      at_barrier |= fibers_[t].waits == Waits::kForBlock;
    }
    for (unsigned t = 0; at_barrier && t < threads_; ++t) {
      threadIdx.x = t;
      if (fibers_[t].waits == Waits::kForever) refuse("has ended, others are at a barrier");
      fibers_[t].waits = Waits::kNot;
    }
    return at_barrier;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  unsigned threads_ = 0;
  jmp_buf main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

template <class Kernel, class... Arguments>
void launch(unsigned seed, unsigned blocks, unsigned threads, Kernel kernel, Arguments... arguments) {
  std::mt19937 order(seed);
  gridDim.x = blocks;
  std::vector<unsigned> turns(blocks);
  for (unsigned b = 0; b < blocks; ++b) turns[b] = b;
  std::shuffle(turns.begin(), turns.end(), order);
  for (const unsigned b : turns) {
    blockIdx.x = b;
    Block::of_now().run(threads, [&] { kernel(arguments...); }, order);
  }
}

template <class Value>
uint64_t as_bits(Value value) {
  static_assert(sizeof(Value) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(Value));
  return bits;
}

template <class Value>
Value from_bits(uint64_t bits) {
  Value value;
  memcpy(&value, &bits, sizeof(Value));
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::of_now().pause(emulated::Waits::kForBlock); }

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulated::kLanes;
  const uint64_t* all = emulated::Block::of_now().exchange(mask, emulated::as_bits(value), 100 + distance);
  return emulated::from_bits<Value>(all[lane < distance ? lane : lane - distance]);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int other) {
  const unsigned lane = threadIdx.x % emulated::kLanes;
  const uint64_t* all = emulated::Block::of_now().exchange(mask, emulated::as_bits(value), 200 + other);
  return emulated::from_bits<Value>(all[lane ^ other]);
}

inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at = min(before, value);
  return before;
}
