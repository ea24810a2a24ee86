// logprob: one block a row reads the logits once, 16 bytes at a time, with an online maximum; the backward reads and writes once, in place if asked.
//
// The mathematics and numerics are those of kernels/logprob/. Rows may start anywhere: elements before the first 16-byte boundary, and behind the
// last whole vector, are taken one by one. A row is summed in a fixed order, whatever its neighbours. Of a row that lists what truncation kept, only those
// columns are summed; the backward marks them in a map of its tile and writes zeros elsewhere.
//
// Options   DTYPE=0: float32; 1: bfloat16; 2: float16. KEPT=1: rows may list what truncation kept; 0: none does.
// Bytes     forward V s a row (the kept columns' alone if they are listed); backward 2 V s.
#include "common.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32, kTile = 8192;  // the backward's columns a block

constexpr int kWidth = 16 / sizeof(Element);
constexpr bool kKept = KEPT;

struct alignas(16) Vector {
    Element at[kWidth];
};

// Elements of a row before its first 16-byte boundary.
__device__ __forceinline__ int64 elements_to_boundary(const Element* row, int64 V) {
    const int64 count = (16 - reinterpret_cast<unsigned long long>(row) % 16) % 16 / sizeof(Element);
    return count < V ? count : V;
}

__device__ __forceinline__ void load_whole(const Element* vector, float z[kWidth]) {
    const Vector x = *reinterpret_cast<const Vector*>(vector);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = widen(x.at[i]);
}

__device__ __forceinline__ void load_vector(const Element* row, int64 v, int64 V, float z[kWidth]) {
    if (v + kWidth <= V) {
        load_whole(row + v, z);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = v + i < V ? widen(row[v + i]) : -infinity();
    }
}

// Over some columns: the maximum m, sum of 2^d, sum of d 2^d, with d = (z - m) scale and scale = log2(e) / T.
struct Sums {
    float m = -infinity(), S = 0.0f, W = 0.0f;
};

// The factor that moves sums from maximum m to `base`, and the shift of their d.
__device__ __forceinline__ float rescale(float m, float base, float scale, float& shift) {
    shift = m == -infinity() ? 0.0f : fmaxf((m - base) * scale, kLeast);
    return exp2_of(shift);
}

template <int kCount>
__device__ __forceinline__ void add(Sums& sums, const float* z, float scale) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, z[i]);
    if (top > sums.m) {
        float shift;
        const float factor = rescale(sums.m, top, scale, shift);
        sums.W = factor * (sums.W + shift * sums.S);
        sums.S *= factor;
        sums.m = top;
    }
    const float base = sums.m == -infinity() ? 0.0f : sums.m;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float d = (z[i] - base) * scale, e = exp2_of(d);
        sums.W += fmaxf(d, kLeast) * e;
        sums.S += e;
    }
}

__device__ __forceinline__ Sums merge(const Sums a, const Sums b, float scale) {
    const float m = fmaxf(a.m, b.m), base = m == -infinity() ? 0.0f : m;
    float shift_a, shift_b;
    const float factor_a = rescale(a.m, base, scale, shift_a), factor_b = rescale(b.m, base, scale, shift_b);
    return {m, factor_a * a.S + factor_b * b.S, factor_a * (a.W + shift_a * a.S) + factor_b * (b.W + shift_b * b.S)};
}

// What truncation kept of a row: `count` ascending columns, or 0 for all of them.
struct Kept {
    const int* columns = nullptr;
    int64 count = 0;
};

__device__ __forceinline__ Kept kept_of(const int* ids, const int64* offsets, int64 n) {
    return kKept ? Kept{ids + offsets[n], offsets[n + 1] - offsets[n]} : Kept{};
}

// stats: per row the maximum, S, and W / S. temperatures: one a row, or null. entropy may be null. An id out of range raises *fault.
extern "C" __global__ void __launch_bounds__(kThreads) logprob_forward(
    const Element* logits, const int64* ids, float* logp, float* entropy, float* stats, const float* temperatures, const int* kept_ids,
    const int64* kept_offsets, int* fault, float temperature, int64 V, int64 row_stride, int64 ignore_index) {
    __shared__ float of_warp[3][kWarps];
    __shared__ int label_is_kept, kept_is_wrong;
    const int64 n = blockIdx.x, label = ids[n];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Element* row = logits + n * row_stride;
    const float T = temperatures == nullptr ? temperature : temperatures[n], scale = kLog2E / T;
    const Kept kept = kept_of(kept_ids, kept_offsets, n);
    Sums sums;
    if (kKept) {
        if (threadIdx.x == 0) label_is_kept = kept.count == 0, kept_is_wrong = 0;
        __syncthreads();
    }
    if (label != ignore_index && kept.count) {
        for (int64 k = threadIdx.x; k < kept.count; k += kThreads) {
            const int64 v = kept.columns[k];
            if (v < 0 || v >= V) {
                kept_is_wrong = 1;
                continue;
            }
            if (v == label) label_is_kept = 1;
            const float z = widen(row[v]);
            add<1>(sums, &z, scale);
        }
    } else if (label != ignore_index) {
        // What lies before the first whole vector and behind the last goes one by one to the first threads.
        const int64 head = elements_to_boundary(row, V), vectors = (V - head) / kWidth, tail = head + vectors * kWidth;
        const int64 edge = threadIdx.x < head ? threadIdx.x : tail + threadIdx.x - head;
        if (edge < V && threadIdx.x < head + kWidth) {
            const float z = widen(row[edge]);
            add<1>(sums, &z, scale);
        }
        const Element* vector = row + head + threadIdx.x * kWidth;
#pragma unroll 4
        for (int i = int(threadIdx.x); i < int(vectors); i += kThreads, vector += kThreads * kWidth) {
            float z[kWidth];
            load_whole(vector, z);
            add<kWidth>(sums, z, scale);
        }
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const Sums other = {__shfl_xor_sync(kAllLanes, sums.m, distance), __shfl_xor_sync(kAllLanes, sums.S, distance),
                            __shfl_xor_sync(kAllLanes, sums.W, distance)};
        sums = merge(sums, other, scale);
    }
    if (lane == 0) of_warp[0][warp] = sums.m, of_warp[1][warp] = sums.S, of_warp[2][warp] = sums.W;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kWarps; ++w) sums = merge(sums, {of_warp[0][w], of_warp[1][w], of_warp[2][w]}, scale);
    const bool in_range = label >= 0 && label < V, wrong = kKept && kept_is_wrong;
    if (wrong) sums.S = not_a_number();
    if (label != ignore_index && (!in_range || wrong)) *fault = 1;
    const float some = sums.S == 0.0f ? 1.0f : sums.S, log_S = logf(some), mean = sums.W * kLn2 / some;
    float result = 0.0f;
    if (label != ignore_index) {
        const float z = !in_range ? not_a_number() : !kKept || label_is_kept ? widen(row[label]) : -infinity();
        result = z == -infinity() && sums.S == sums.S ? z : (z - sums.m) / T - log_S;
    }
    logp[n] = result;
    if (entropy != nullptr) entropy[n] = log_S - mean;
    stats[3 * n] = sums.m, stats[3 * n + 1] = sums.S, stats[3 * n + 2] = mean;
}

// The place of the first kept column that is not before `column`.
__device__ __forceinline__ int64 first_at_least(const Kept kept, int64 column) {
    int64 low = 0, high = kept.count;
    while (low < high) {
        const int64 middle = (low + high) / 2;
        if (kept.columns[middle] < column) low = middle + 1; else high = middle;
    }
    return low;
}

constexpr int kMapWords = (kTile + kWidth) / 4;
union Map {
    unsigned words[kMapWords];
    unsigned char at[4 * kMapWords];
};

__device__ __forceinline__ bool any_kept(const Map& map, int64 i) {  // of a vector's columns, the first one at map.at[i]
    return (map.words[i / 4] | map.words[(i + kWidth) / 4 - 1]) != 0;
}

// grad may be the logits. logp_grad or entropy_grad may be null. Block (n, tile).
extern "C" __global__ void __launch_bounds__(kThreads) logprob_backward(
    const float* logp_grad, const float* entropy_grad, const Element* logits, const int64* ids, const float* logp, const float* stats, Element* grad,
    const float* temperatures, const int* kept_ids, const int64* kept_offsets, float temperature, int64 V, int64 row_stride, int64 grad_stride,
    int64 ignore_index) {
    __shared__ Map map;
    const int64 n = blockIdx.x, label = ids[n];
    const Element* row = logits + n * row_stride;
    Element* out = grad + n * grad_stride;
    const float T = temperatures == nullptr ? temperature : temperatures[n];
    const float m = stats[3 * n], S = stats[3 * n + 1], mean = stats[3 * n + 2], h = entropy_grad == nullptr ? 0.0f : entropy_grad[n];
    // A label on -inf gets nothing from g. The logit itself may be gone: another block of an in-place call may have been here.
    float g = logp_grad == nullptr || logp[n] == -infinity() ? 0.0f : logp_grad[n];
    // A row that no gradient reaches is zero whatever it holds; it is not even read.
    const bool live = label != ignore_index && (g != 0.0f || h != 0.0f) && S != 0.0f;
    if (label < 0 || label >= V) g = not_a_number();
    // p (constant - slope d) with p = 2^d / S, plus g at the label, all of them over T
    const float scale = kLog2E / T, of_S = 1.0f / S;
    g /= T;
    const float of_T = h / T, constant = of_T * mean - g, slope = of_T * kLn2;
    const Kept kept = kept_of(kept_ids, kept_offsets, n);
    const bool listed = live && kept.count;

    const int64 head = elements_to_boundary(row, V), begin = head + int64(blockIdx.y) * kTile, end = begin + kTile < V ? begin + kTile : V;
    const bool same_boundary = (reinterpret_cast<unsigned long long>(out) - reinterpret_cast<unsigned long long>(row)) % 16 == 0;
    // map.at[v - begin + kWidth] of a listed row: whether column v was kept.
    if (listed) {
        for (int i = threadIdx.x; i < kMapWords; i += kThreads) map.words[i] = 0;
        __syncthreads();
        const int64 from = blockIdx.y == 0 ? 0 : begin;
        for (int64 k = first_at_least(kept, from) + threadIdx.x; k < kept.count && kept.columns[k] < end; k += kThreads) {
            if (kept.columns[k] >= from) map.at[kept.columns[k] - begin + kWidth] = 1;
        }
        __syncthreads();
    }
    const auto gradient = [&](float z, int64 v) {
        if (!live || (listed && !map.at[v - begin + kWidth])) return 0.0f;
        const float d = (z - m) * scale, grad = exp2_of(d) * of_S * (constant - slope * fmaxf(d, kLeast));
        return v == label ? grad + g : grad;
    };
    if (blockIdx.y == 0 && threadIdx.x < head) out[threadIdx.x] = narrow(gradient(live ? widen(row[threadIdx.x]) : 0.0f, threadIdx.x));
#pragma unroll (kKept ? 1 : 2)  // twice spills on sm_100
    for (int64 v = begin + threadIdx.x * kWidth; v < end; v += kThreads * kWidth) {
        float z[kWidth] = {};
        if (listed ? any_kept(map, v - begin + kWidth) : live) load_vector(row, v, V, z);
        Vector x;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x.at[i] = narrow(gradient(z[i], v + i));
        if (same_boundary && v + kWidth <= V) {
            *reinterpret_cast<Vector*>(out + v) = x;
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if (v + i < V) out[v + i] = x.at[i];
            }
        }
    }
}
