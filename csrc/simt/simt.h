// Stands in for CUDA's built-ins, so that g++ builds the very same .cu files for a CPU. For tests only; nothing of it ships.
//
// Every thread of a block is a fiber of this one OS thread; blocks run one after another. A fiber runs until it waits: at __syncthreads for its
// block, at a warp operation for the lanes that the mask names. When nothing can run any more and somebody still waits, the barrier was
// divergent (others left, or wait elsewhere), which a GPU answers with a hang or with garbage and this header with an error. A warp runs as far
// ahead as it can, in ascending or descending order, on request: a missing barrier shows as a difference. Shared memory is poisoned before each block.
//
// A test builds     #include "simt.h"
//                   #include "x.cu"
//                   SIMT_KERNEL(name)
// and calls simt_name(arguments as for cuLaunchKernel, grid, block, descending), which returns nullptr or the error.
// Lanes of a warp do not run in lockstep (nor do they on a GPU), the memory model is sequential, and shared variables must be static ones of kernels.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#define FUSEDRL_SIMT 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("simt_shared"), used)) static

extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr std::size_t kStack = 64 * 1024;

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    enum { kNew, kReady, kBarrier, kWarp, kDone } state;
    int line;            // of the operation it waits in
    unsigned mask;       // of that warp operation
    int source;          // the lane that it reads, or kBallot
    uint64_t deposited;
    uint64_t received;
};
constexpr int kBallot = -1;

struct Block {
    std::vector<Fiber> fibers;
    std::vector<char*> stacks;
    jmp_buf scheduler;
    unsigned current = 0;
    void (*call)(void*) = nullptr;
    void* context = nullptr;
    std::string error;
};

static Block& block() {  // not inline: libraries would share it
    static Block instance;
    return instance;
}

inline Fiber& self() { return block().fibers[block().current]; }

inline void enter() {
    Block& b = block();
    b.call(b.context);
    self().state = Fiber::kDone;
    _longjmp(b.scheduler, 1);
}

inline void wait(decltype(Fiber::state) state, int line) {
    Fiber& fiber = self();
    fiber.state = state, fiber.line = line;
    if (_setjmp(fiber.at) == 0) _longjmp(block().scheduler, 1);
}

inline void resume(unsigned index) {
    Block& b = block();
    b.current = index, threadIdx.x = index;
    Fiber& fiber = b.fibers[index];
    if (_setjmp(b.scheduler) != 0) return;
    if (fiber.state == Fiber::kNew) {
        fiber.state = Fiber::kReady;
        setcontext(&fiber.start);
    }
    fiber.state = Fiber::kReady;
    _longjmp(fiber.at, 1);
}

inline void fail(const std::string& what) {
    if (block().error.empty()) block().error = what;
}

inline std::string where(unsigned index) { return "thread " + std::to_string(index) + " at line " + std::to_string(block().fibers[index].line); }

// If every lane that fiber `index` waits for has arrived in the same warp operation: hands all of them their results.
inline void finish_warp_operation(unsigned index) {
    Block& b = block();
    const unsigned first = index & ~31u, mask = b.fibers[index].mask;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        if (first + lane >= b.fibers.size()) return fail("a warp operation names lanes that do not exist: " + where(index));
        const Fiber& other = b.fibers[first + lane];
        if (other.state != Fiber::kWarp) return;
        if (other.line != b.fibers[index].line || other.mask != mask) {
            return fail("a warp operation met another one: " + where(index) + ", " + where(first + lane));
        }
    }
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1u) votes |= (b.fibers[first + lane].deposited & 1u) << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        Fiber& fiber = b.fibers[first + lane];
        if (fiber.source != kBallot && !(mask >> fiber.source & 1u)) return fail("a shuffle reads a lane outside its mask: " + where(first + lane));
        fiber.received = fiber.source == kBallot ? votes : b.fibers[first + fiber.source].deposited;
        fiber.state = Fiber::kReady;
    }
}

inline void run_block(bool descending) {
    Block& b = block();
    const unsigned count = b.fibers.size();
    unsigned done = 0;
    while (done < count && b.error.empty()) {
        bool moved = false;
        for (unsigned w = 0, warps = (count + 31) / 32; w < warps; ++w) {
            const unsigned first = 32 * (descending ? warps - 1 - w : w), lanes = first + 32 < count ? 32 : count - first;
            for (bool again = true; again && b.error.empty();) {  // a warp runs as far ahead of the others as it can
                again = false;
                for (unsigned step = 0; step < lanes && b.error.empty(); ++step) {
                    const unsigned index = first + (descending ? lanes - 1 - step : step);
                    Fiber& fiber = b.fibers[index];
                    if (fiber.state != Fiber::kNew && fiber.state != Fiber::kReady) continue;
                    resume(index);
                    moved = again = true;
                    done += fiber.state == Fiber::kDone;
                    if (fiber.state == Fiber::kWarp) finish_warp_operation(index);
                }
            }
        }
        unsigned waiting = 0, barrier = 0;
        for (unsigned index = 0; index < count; ++index) {
            if (b.fibers[index].state == Fiber::kBarrier) barrier = index, ++waiting;
        }
        if (waiting == count) {
            for (unsigned index = 0; index < count; ++index) {
                if (b.fibers[index].line != b.fibers[barrier].line) fail("divergent __syncthreads: " + where(index) + ", " + where(barrier));
                b.fibers[index].state = Fiber::kReady;
            }
        } else if (!moved) {
            std::string who;
            for (unsigned index = 0; index < count && who.empty(); ++index) {
                if (b.fibers[index].state != Fiber::kDone) who = where(index);
            }
            fail("divergent barrier: " + who + " waits for threads that left or wait elsewhere");
        }
    }
}

inline const char* launch(void (*call)(void*), void* context, dim3 grid, unsigned threads, bool descending) {
    Block& b = block();
    b.call = call, b.context = context, b.error.clear();
    while (b.stacks.size() < threads) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) return "no memory for stacks";
        b.stacks.push_back(static_cast<char*>(stack));
    }
    b.fibers.resize(threads);
    gridDim = grid, blockDim = {threads, 1, 1}, threadIdx = {0, 0, 0};
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                if (__start_simt_shared) std::memset(__start_simt_shared, 0xff, __stop_simt_shared - __start_simt_shared);  // NaN, -1
                for (unsigned index = 0; index < threads; ++index) {
                    Fiber& fiber = b.fibers[index];
                    fiber.state = Fiber::kNew;
                    getcontext(&fiber.start);
                    fiber.start.uc_stack.ss_sp = b.stacks[index];
                    fiber.start.uc_stack.ss_size = kStack;
                    fiber.start.uc_link = nullptr;
                    makecontext(&fiber.start, enter, 0);
                }
                run_block(descending);
                if (!b.error.empty()) return b.error.c_str();
            }
        }
    }
    return nullptr;
}

// Every named lane deposits a value and receives that of lane `source`, or all lanes' lowest bits.
template <class T>
T exchange(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= 8);
    Fiber& fiber = self();
    if (!(mask >> (threadIdx.x & 31u) & 1u)) fail("a lane is not in the mask of its own warp operation, line " + std::to_string(line));
    std::memcpy(&fiber.deposited, &value, sizeof(T));
    fiber.mask = mask, fiber.source = source;
    wait(Fiber::kWarp, line);
    T result;
    std::memcpy(&result, &fiber.received, sizeof(T));
    return result;
}

template <class... A>
struct Call {
    void (*kernel)(A...);
    void** arguments;
    template <std::size_t... I>
    void invoke(std::index_sequence<I...>) { kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...); }
    static void run(void* call) { static_cast<Call*>(call)->invoke(std::index_sequence_for<A...>()); }
};

template <class... A>
const char* launch_kernel(void (*kernel)(A...), void** arguments, const unsigned* grid, unsigned threads, bool descending) {
    Call<A...> call{kernel, arguments};
    return launch(Call<A...>::run, &call, {grid[0], grid[1], grid[2]}, threads, descending);
}

// The sizes of the parameters, then a 0.
template <class... A>
const int* sizes(void (*)(A...)) {
    static const int all[] = {int(sizeof(A))..., 0};
    return all;
}

}  // namespace simt

#define SIMT_KERNEL(name)                                                                                                               \
    extern "C" const char* simt_##name(void** arguments, const unsigned* grid, unsigned threads, int descending) {                      \
        return simt::launch_kernel(name, arguments, grid, threads, descending != 0);                                                    \
    }                                                                                                                                   \
    extern "C" const int* simt_sizes_##name() { return simt::sizes(name); }

// ---- the built-ins -----------------------------------------------------------------------------------------------------------------
inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(simt::Fiber::kBarrier, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { simt::exchange(mask, 0, int(threadIdx.x & 31u), line); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
    return simt::exchange(mask, value, source & 31, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int line = __builtin_LINE()) {
    return simt::exchange(mask, value, ((threadIdx.x & 31u) ^ with) & 31u, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
    const unsigned lane = threadIdx.x & 31u;
    return simt::exchange(mask, value, lane + by < 32 ? lane + by : lane, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
    const unsigned lane = threadIdx.x & 31u;
    return simt::exchange(mask, value, lane >= by ? lane - by : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return unsigned(simt::exchange(mask, uint64_t(predicate != 0), simt::kBallot, line));
}
inline int atomicAdd(int* address, int value) { return (*address += value) - value; }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return (*address += value) - value; }
inline void __threadfence() {}
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __expf(float x) { return std::exp(x); }
template <class To, class From>
To simt_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline float from_half(unsigned bits) { return float(simt_bits<_Float16>(uint16_t(bits))); }
inline unsigned to_half(float x) { return simt_bits<uint16_t>(_Float16(x)); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
