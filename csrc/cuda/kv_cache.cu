// rope_and_cache: one launch norms and rotates queries and keys, and writes keys and values into the paged cache.
//
// The mathematics and numerics are those of kernels/kv_cache/. A block takes 16 tokens, a warp each, and a few of their heads: a lane holds the
// angles of its pairs for all of them. A key is transposed through shared memory, because the cache holds [D][S] inside a block: 16 consecutive
// slots are then 16 consecutive elements, and a prompt's tokens have such slots. (Of single tokens every element is a sector of its own, whatever
// the kernel.) A row that is not written is not read for its key and value either.
//
// Options   DTYPE=0: float32; 1: bfloat16; 2: float16. HALF: D / 2. WIDTH: neighbours that a lane moves at once, 1 or 2; for 2 HALF is even and
//           every row starts on two elements.
// Bytes     2 (Hq + 2 Hkv) D s + 4 D a token, the angles being read again from L2 by the blocks of the token's other heads.
#include "common.cuh"

constexpr int kTokens = 16, kThreads = 32 * kTokens, kHeads = 4;
constexpr int kDim = 2 * HALF, kStep = 32 * WIDTH, kSteps = (HALF + kStep - 1) / kStep;  // of the lanes along a half
constexpr int kPitch = kDim + 2;  // of a key in shared memory: the 16 tokens of one d lie in 16 banks

template <class T>
struct alignas(WIDTH * sizeof(T)) Pack {
    T at[WIDTH];
};

template <class T>
__device__ __forceinline__ Pack<T> load(const T* from) {
    return *reinterpret_cast<const Pack<T>*>(from);
}

// One lane's share of a head's halves: neighbours lane * WIDTH + step * kStep + j.
struct Pairs {
    float first[kSteps][WIDTH], second[kSteps][WIDTH];
};

struct Slot {
    int64 block;
    int at;
    bool live;
};

__device__ __forceinline__ Slot locate(const int64* slots, int64 n, int64 N, int64 end, int size) {
    const int64 slot = n < N ? slots[n] : -1;
    if (slot < 0 || slot >= end) return {0, 0, false};
    return {slot / size, int(slot % size), true};
}

// rope(norm(x)); no norm where `weight` is null.
__device__ __forceinline__ Pairs turn(const Element* x, const Element* weight, float eps, const Pairs& angles, int lane) {
    Pairs u;
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int i = lane * WIDTH + step * kStep;
        Pack<Element> first{}, second{};
        if (i < HALF) first = load(x + i), second = load(x + HALF + i);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            u.first[step][j] = widen(first.at[j]), u.second[step][j] = widen(second.at[j]);
            squares += u.first[step][j] * u.first[step][j] + u.second[step][j] * u.second[step][j];
        }
    }
    if (weight != nullptr) {
        const float scale = 1.0f / sqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = lane * WIDTH + step * kStep;
            if (i < HALF) {
                const Pack<Element> first = load(weight + i), second = load(weight + HALF + i);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) u.first[step][j] *= scale * widen(first.at[j]), u.second[step][j] *= scale * widen(second.at[j]);
            }
        }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const float a = u.first[step][j], b = u.second[step][j], cos = angles.first[step][j], sin = angles.second[step][j];
            u.first[step][j] = a * cos - b * sin, u.second[step][j] = b * cos + a * sin;
        }
    }
    return u;
}

__device__ __forceinline__ void store(Element* to, const Pairs& u, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int i = lane * WIDTH + step * kStep;
        if (i < HALF) {
            Pack<Element> first, second;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) first.at[j] = narrow(u.first[step][j]), second.at[j] = narrow(u.second[step][j]);
            *reinterpret_cast<Pack<Element>*>(to + i) = first;
            *reinterpret_cast<Pack<Element>*>(to + HALF + i) = second;
        }
    }
}

// end: blocks of the cache x size, the positions of a block. q_norm and k_norm may be null. Block (tile of tokens, group of heads).
extern "C" __global__ void __launch_bounds__(kThreads) rope_and_cache(
    const Element* qkv, const float* cos, const float* sin, const Element* q_norm, const Element* k_norm, const int64* slots, Element* q, Element* k_cache,
    Element* v_cache, int64 N, int64 row_stride, int64 end, int size, int q_heads, int kv_heads, float eps) {
    alignas(WIDTH * sizeof(Element)) __shared__ Element keys[kTokens][kPitch];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 start = int64(blockIdx.x) * kTokens, n = start + warp;
    const int heads = q_heads + 2 * kv_heads, head = blockIdx.y * kHeads, last = min(head + kHeads, heads);
    const Slot own = locate(slots, n, N, end, size);  // of what this thread reads; then of the keys that it writes
    const Slot column = locate(slots, start + threadIdx.x % kTokens, N, end, size);
    Pairs angles{};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int i = lane * WIDTH + step * kStep;
        if (n < N && i < HALF) {
            const Pack<float> c = load(cos + n * HALF + i), s = load(sin + n * HALF + i);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) angles.first[step][j] = c.at[j], angles.second[step][j] = s.at[j];
        }
    }
    for (int h = head; h < last; ++h) {
        const Element* x = qkv + n * row_stride + int64(h) * kDim;
        if (h < q_heads) {
            if (n < N) store(q + (n * q_heads + h) * kDim, turn(x, q_norm, eps, angles, lane), lane);
        } else if (h < q_heads + kv_heads) {
            if (own.live) store(keys[warp], turn(x, k_norm, eps, angles, lane), lane);
            __syncthreads();
            Element* to = k_cache + (column.block * kv_heads + h - q_heads) * kDim * size + column.at;
            if (column.live) {
#pragma unroll 4
                for (int d = threadIdx.x / kTokens; d < kDim; d += kThreads / kTokens) to[int64(d) * size] = keys[threadIdx.x % kTokens][d];
            }
            __syncthreads();
        } else if (own.live) {
            Element* to = v_cache + ((own.block * kv_heads + h - q_heads - kv_heads) * size + own.at) * kDim;
#pragma unroll
            for (int i = lane * WIDTH; i < kDim; i += kStep) *reinterpret_cast<Pack<Element>*>(to + i) = load(x + i);
        }
    }
}
