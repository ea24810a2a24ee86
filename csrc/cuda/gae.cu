// gae and shaped_gae: one block a sequence shapes the rewards, scans and sums; a second launch applies the whitening.
//
// The mathematics is that of kernels/gae/. A sequence is walked in chunks from its end; the advantage, the value and "something live follows"
// are carried from chunk to chunk. Within a chunk a ballot finds the next live value, and the recurrence's (a, b) are composed from the right: first
// over the four tokens of a thread, then over a warp by shuffles, then over the warps through shared memory.
//
// Options   ALIGNED=1: every token array starts on 16 bytes (the mask on 4), so tokens move four at a time; 0: one by one.
// Bytes     every input is read once. Numerics: float32 elements; what is summed over a sequence is float64. Fixed order, no atomics.
#include "common.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32, kItems = 4, kChunk = kThreads * kItems;

enum Estimator { kK1, kK2, kK3, kAbs };  // the order of kernels/kl/

__device__ __forceinline__ float token_kl(float logp, float ref_logp, int estimator) {
    const float d = logp - ref_logp;
    if (estimator == kK1) return d;
    if (estimator == kK2) return 0.5f * d * d;
    if (estimator == kAbs) return fabsf(d);
    const float x = d < -20.0f ? 20.0f : d > 20.0f ? -20.0f : -d;  // comparisons, since fminf drops NaN
    float kl;
    if (fabsf(x) < 0.5f) {  // expm1(x) - x cancels for small x: there its series, up to x^9 / 9!
        const float near = 1.0f + x / 3.0f * (1.0f + x / 4.0f * (1.0f + x / 5.0f * (1.0f + x / 6.0f * (1.0f + x / 7.0f * (1.0f + x / 8.0f * (1.0f + x / 9.0f))))));
        kl = 0.5f * x * x * near;
    } else {
        kl = (expf(x) - 1.0f) + d;
    }
    return kl < 0.0f ? 0.0f : kl;
}

struct Sequence {
    int64 start, end;
};

__device__ __forceinline__ Sequence sequence_of_block(const int* cu_seqlens, int64 T) {
    const int64 b = blockIdx.x;
    return cu_seqlens == nullptr ? Sequence{b * T, b * T + T} : Sequence{cu_seqlens[b], cu_seqlens[b + 1]};
}

struct Tokens {
    const float *logp, *ref_logp, *values, *rewards;  // logp and ref_logp: shaped only; rewards: what is added to the shaping, may be null there
    const unsigned char* mask;                        // null: all live
    float *advantages, *returns, *shaped_rewards;
};

struct Coefficients {
    float kl_coef, gamma, decay, score, last_value;
    int estimator;
};

struct Sums {  // of one thread
    double kl, deviations, squares;
    int count;
    float pivot;  // an advantage of the sequence, from which deviations are counted
};

struct Shared {  // of every warp. The two barriers of a chunk separate the writes of each half from the reads of it, of this chunk and the last.
    float value[kWarps], a[kWarps], b[kWarps];
    int live[kWarps];
};

template <bool kShaped>
__device__ __forceinline__ Sums scan(const Sequence sequence, const Tokens tokens, const Coefficients c, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 base = sequence.start & ~int64(3);  // chunks begin at multiples of four tokens
    const int64 chunks = sequence.end > sequence.start ? (sequence.end - base + kChunk - 1) / kChunk : 0;
    float carry_advantage = 0.0f, carry_value = c.last_value;
    bool carry_live = false;
    Sums sums{};
    for (int64 chunk = 0; chunk < chunks; ++chunk) {
        const int64 t = base + (chunks - 1 - chunk) * kChunk + threadIdx.x * kItems;
        const bool whole = ALIGNED && t >= sequence.start && t + kItems <= sequence.end;
        bool inside[kItems], live[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) live[i] = inside[i] = t + i >= sequence.start && t + i < sequence.end;
        if (tokens.mask != nullptr) {
            if (whole) {
                const uchar4 m = *reinterpret_cast<const uchar4*>(tokens.mask + t);
                live[0] = m.x, live[1] = m.y, live[2] = m.z, live[3] = m.w;
            } else {
#pragma unroll
                for (int i = 0; i < kItems; ++i) live[i] = inside[i] && tokens.mask[t + i];
            }
        }
        float v[kItems], reward[kItems], logp[kItems], ref_logp[kItems];
        load4(v, tokens.values, t, whole, inside);
        if constexpr (kShaped) {
            load4(logp, tokens.logp, t, whole, inside);
            load4(ref_logp, tokens.ref_logp, t, whole, inside);
        }
        if (tokens.rewards != nullptr) {
            load4(reward, tokens.rewards, t, whole, inside);
        } else {
#pragma unroll
            for (int i = 0; i < kItems; ++i) reward[i] = 0.0f;
        }

        // The next live value: of this thread, else of the nearest lane to the right, else warp, else chunk.
        float first_value = 0.0f;
        bool any = false;
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            if (live[i]) first_value = v[i], any = true;
        }
        const unsigned lanes = __ballot_sync(kAllLanes, any), to_the_right = lanes & ~((2u << lane) - 1u);
        float next_value = __shfl_sync(kAllLanes, first_value, to_the_right ? __ffs(to_the_right) - 1 : 31);
        const float value_of_warp = __shfl_sync(kAllLanes, first_value, lanes ? __ffs(lanes) - 1 : 0);
        bool has_next = to_the_right != 0;
        if (lane == 0) shared.live[warp] = lanes != 0, shared.value[warp] = value_of_warp;
        __syncthreads();
        float after_value = carry_value;
        bool after_live = carry_live;
#pragma unroll
        for (int w = kWarps - 1; w >= 0; --w) {
            if (w == warp && !has_next) next_value = after_value, has_next = after_live;
            if (shared.live[w]) after_value = shared.value[w], after_live = true;
        }
        carry_value = after_value, carry_live = after_live;

        // A_i = b_i + a_i A behind the thread's last token
        float a[kItems], b[kItems], total_a = 1.0f, total_b = 0.0f;
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            if (live[i]) {
                if constexpr (kShaped) {
                    const float kl = token_kl(logp[i], ref_logp[i], c.estimator);
                    sums.kl += kl;
                    reward[i] -= c.kl_coef * kl;
                    if (!has_next) reward[i] += c.score;
                }
                total_b = (reward[i] + (c.gamma * next_value - v[i])) + c.decay * total_b;
                total_a *= c.decay;
                next_value = v[i], has_next = true;
            } else {
                reward[i] = 0.0f;
            }
            a[i] = total_a, b[i] = total_b;
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const float a_right = __shfl_down_sync(kAllLanes, total_a, distance), b_right = __shfl_down_sync(kAllLanes, total_b, distance);
            if (lane + distance < 32) total_b += total_a * b_right, total_a *= a_right;
        }
        if (lane == 0) shared.a[warp] = total_a, shared.b[warp] = total_b;
        float a_right = __shfl_down_sync(kAllLanes, total_a, 1), b_right = __shfl_down_sync(kAllLanes, total_b, 1);
        if (lane == 31) a_right = 1.0f, b_right = 0.0f;
        __syncthreads();
        float running = carry_advantage, behind_warp = 0.0f;
#pragma unroll
        for (int w = kWarps - 1; w >= 0; --w) {
            if (w == warp) behind_warp = running;
            running = shared.b[w] + shared.a[w] * running;
        }
        carry_advantage = running;
        if (chunk == 0) sums.pivot = running;
        const float behind = b_right + a_right * behind_warp;

        float advantage[kItems], target[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            advantage[i] = live[i] ? b[i] + a[i] * behind : 0.0f;
            target[i] = live[i] ? advantage[i] + v[i] : 0.0f;
            if (kShaped && live[i]) {
                const double deviation = double(advantage[i]) - double(sums.pivot);
                sums.count += 1;
                sums.deviations += deviation;
                sums.squares += deviation * deviation;
            }
        }
        store4(tokens.advantages, t, advantage, whole, inside);
        store4(tokens.returns, t, target, whole, inside);
        if constexpr (kShaped) store4(tokens.shaped_rewards, t, reward, whole, inside);
    }
    return sums;
}

// moments: per sequence count, mean and sum of squared deviations of the advantages; null when nothing will be whitened.
extern "C" __global__ void __launch_bounds__(kThreads, 3) shaped_gae(
    const float* logp, const float* ref_logp, const float* values, const float* scores, const unsigned char* mask, const int* cu_seqlens,
    const float* kl_coef_on_device, const float* token_rewards, float* advantages, float* returns, float* rewards, float* kl_per_sequence,
    float* score_per_sequence, double* moments, int64 T, float kl_coef, float gamma, float decay, float score_bound, int estimator) {
    __shared__ Shared shared;
    __shared__ double partial[4][kWarps];
    const int b = blockIdx.x;
    const float given = scores[b];
    const float score = given > score_bound ? score_bound : given < -score_bound ? -score_bound : given;
    const Sums sums = scan<true>(sequence_of_block(cu_seqlens, T), {logp, ref_logp, values, token_rewards, mask, advantages, returns, rewards},
                                 {kl_coef_on_device == nullptr ? kl_coef : *kl_coef_on_device, gamma, decay, score, 0.0f, estimator}, shared);
    const double kl = block_sum<kWarps>(sums.kl, partial[0]);
    if (threadIdx.x == 0) kl_per_sequence[b] = float(kl), score_per_sequence[b] = score;
    if (moments == nullptr) return;
    const double count = block_sum<kWarps>(double(sums.count), partial[1]), some = count > 0.0 ? count : 1.0;
    const double deviations = block_sum<kWarps>(sums.deviations, partial[2]), squares = block_sum<kWarps>(sums.squares, partial[3]);
    if (threadIdx.x == 0) {
        moments[3 * b] = count;
        moments[3 * b + 1] = double(sums.pivot) + deviations / some;
        moments[3 * b + 2] = squares - deviations * (deviations / some);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) gae(
    const float* rewards, const float* values, const unsigned char* mask, const int* cu_seqlens, const float* last_values, float* advantages,
    float* returns, int64 T, float gamma, float decay) {
    __shared__ Shared shared;
    const float last_value = last_values == nullptr ? 0.0f : last_values[blockIdx.x];
    scan<false>(sequence_of_block(cu_seqlens, T), {nullptr, nullptr, values, rewards, mask, advantages, returns, nullptr},
                {0.0f, gamma, decay, 0.0f, last_value, kK1}, shared);
}

// Every block sums up all sequences' moments in the same order, then whitens its share of the tokens.
extern "C" __global__ void __launch_bounds__(kThreads, 6) whiten(float* advantages, const unsigned char* mask, const double* moments, int64 N, int B, int unbiased,
                                                              float eps) {
    __shared__ double partial[3][kWarps];
    double count = 0.0, total = 0.0, m2 = 0.0;
    for (int b = threadIdx.x; b < B; b += kThreads) {
        count += moments[3 * b];
        total += moments[3 * b] * moments[3 * b + 1];
    }
    count = block_sum<kWarps>(count, partial[0]);
    const double mean = block_sum<kWarps>(total, partial[1]) / (count > 0.0 ? count : 1.0);
    for (int b = threadIdx.x; b < B; b += kThreads) {
        const double shift = moments[3 * b + 1] - mean;
        m2 += moments[3 * b + 2] + moments[3 * b] * shift * shift;
    }
    m2 = block_sum<kWarps>(m2, partial[2]);
    const double divisor = count - unbiased;
    const float rstd = float(1.0 / sqrt(m2 / (divisor > 1.0 ? divisor : 1.0) + double(eps)));
    const float high = float(mean), low = float(mean - double(high));  // mean = high + low: the difference to a large mean stays exact
    for (int64 t = int64(blockIdx.x) * kThreads + threadIdx.x; t < N; t += int64(gridDim.x) * kThreads) {
        if (mask[t]) advantages[t] = ((advantages[t] - high) - low) * rstd;
    }
}
