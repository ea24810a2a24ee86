// policy_value_loss: one launch forms the gradients and the sums of each block of tokens, a second one, of one block, adds the blocks up.
//
// The mathematics, shapes and numerics are those of kernels/policy_loss/: the policy part where logp is not null, the value part where values is
// not null. partials [kRows, blocks] float32, one row a sum: read by rows in a fixed order, so no atomics.
//
// Options   ALIGNED=1: every token array starts on 16 bytes, so tokens move four at a time; 0: one by one. KIND: the policy term, and KL_ESTIMATOR and
//           KL_GRADIENT: whose value and whose slope the KL term takes; names of csrc/shared/objectives.h, which has their mathematics.
// Bytes     policy 16 N read (4 N more for each optional input) and 4 N written; value 8 N (12 N with a clip) and 4 N; the partials are N / 20 bytes.
#include "common.cuh"
#include "objectives.h"

using objectives::Coefficients;
using objectives::Kind;
using objectives::Kl;

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroups = 2, kBlock = kThreads * 4 * kGroups;

constexpr Kind kKind = Kind::KIND;
constexpr Kl kEstimator = Kl::KL_ESTIMATOR, kSlope = Kl::KL_GRADIENT;

enum Row {
    kLoss, kLow, kHigh, kDual, kK1, kK2, kK3, kRatio, kSquared, kClamped, kRefKl, kEntropy, kCorrection, kTokens,  // sums; up to kK3 as in PolicyStats
    kValueLoss, kValueClipped, kValue, kReturn, kResidual,
    kSums,
    kNegatedMin = kSums, kMax,  // maxima
    kReturnRest, kReturnSquares, kResidualRest, kResidualSquares,  // a block's mean less its rounded value, and its sum of squared deviations
    kRows
};

// The numbers of objectives.h: one token.
struct One {
    using Number = float;
    using Mask = bool;
    static __device__ __forceinline__ float choose(bool mask, float a, float b) { return mask ? a : b; }
    static __device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
    static __device__ __forceinline__ float exponential(float x) { return expf(x); }
    // Comparisons, since fminf drops NaN.
    static __device__ __forceinline__ float clamped(float d) { return d > 20.0f ? 20.0f : d < -20.0f ? -20.0f : d; }
    // With d = k ln 2 + f, e^f - 1 - f = f^2 q(f) is free of cancellation, which matters where d is small, and there k = 0.
    static __device__ __forceinline__ float expand(float d, float& excess) {
        const float x = clamped(d);
        const float k = floorf(x * 1.44269504f + 0.5f);
        const float f = x - k * 0.693359375f + k * 2.12194440e-4f;
        const float q = ((((f * (1.0f / 5040) + 1.0f / 720) * f + 1.0f / 120) * f + 1.0f / 24) * f + 1.0f / 6) * f + 0.5f;
        const float small = f * f * q;
        const float power = k == k ? __int_as_float((int(k) + 127) << 23) : k;
        const float ratio = power * (f + small) + power;
        const float large = ratio - 1.0f - d;
        excess = k == 0.0f ? small : large < 0.0f ? 0.0f : large;
        return ratio;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 2) policy_value_loss(
    const float* logp, const float* old_logp, const float* advantages, const float* weights, const float* entropy, const float* values,
    const float* old_values, const float* returns, const float* ref_logp, const float* correction, const float* sequence_log_ratio, const float* kl_sum,
    float* logp_grad, float* values_grad, float* partials, int64 N, Coefficients<float> c) {
    __shared__ float of_warp[kRows][kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kSums] = {}, negated_min = -infinity(), largest = -infinity();
    bool live[kGroups * 4];
    float target[kGroups * 4], residual[kGroups * 4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const int64 n = int64(blockIdx.x) * kBlock + group * (kThreads * 4) + threadIdx.x * 4;
        const bool whole = ALIGNED && n + 4 <= N;
        bool inside[4];
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) inside[i] = n + i < N;
        load4(w, weights, n, whole, inside);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            live[group * 4 + i] = w[i] != 0.0f;
            sums[kTokens] += w[i] != 0.0f;
        }
        if (logp != nullptr) {
            float now[4], old[4], advantage[4], bonus[4], ref[4], factor[4], log_s[4] = {}, of_sequence[4], gradient[4];
            load4(now, logp, n, whole, inside);
            load4(old, old_logp, n, whole, inside);
            load4(advantage, advantages, n, whole, inside);
            if (entropy != nullptr) load4(bonus, entropy, n, whole, inside);
            if (ref_logp != nullptr) load4(ref, ref_logp, n, whole, inside);
            if (correction != nullptr) load4(factor, correction, n, whole, inside);
            if constexpr (objectives::by_sequence(kKind)) load4(log_s, sequence_log_ratio, n, whole, inside);
            if (kl_sum != nullptr) load4(of_sequence, kl_sum, n, whole, inside);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                gradient[i] = 0.0f;
                if (w[i] == 0.0f) continue;
                const float d = now[i] - old[i];
                float excess;
                const float ratio = One::expand(d, excess), A = advantage[i];
                const bool beyond = fabsf(d) > 20.0f;
                const auto found = objectives::policy_term<kKind, One>(c, {A, now[i], d, ratio, excess, log_s[i], true, beyond});
                float term = found.rest - A * found.bounded, slope = found.rest_slope - A * found.slope;
                if (correction != nullptr) term *= factor[i], slope *= factor[i];
                sums[kCorrection] += correction == nullptr ? 1.0f : factor[i];
                if (ref_logp != nullptr) {
                    const float k = now[i] - ref[i], sum = kl_sum == nullptr ? k : of_sequence[i];
                    const float kl = objectives::kl_value<One>(kEstimator, k, sum);
                    if (c.kl_coef != 0.0f) term += c.kl_coef * kl, slope += c.kl_coef * objectives::kl_slope<One>(kSlope, k, sum);
                    sums[kRefKl] += kl;
                }
                if (entropy != nullptr) term -= c.entropy_coef * bonus[i], sums[kEntropy] += bonus[i];
                gradient[i] = w[i] * slope;
                sums[kLoss] += w[i] * term;
                sums[kLow] += found.low, sums[kHigh] += found.high, sums[kDual] += found.too_far, sums[kClamped] += beyond;
                sums[kK1] -= d;
                sums[kK2] += d * d * 0.5f;
                sums[kK3] += excess;
                sums[kRatio] += ratio;
                sums[kSquared] += ratio * ratio;
                negated_min = fmaxf(negated_min, -ratio);
                largest = fmaxf(largest, ratio);
            }
            store4(logp_grad, n, gradient, whole, inside);
        }
        if (values != nullptr) {
            float value[4], old[4], wanted[4], gradient[4];
            load4(value, values, n, whole, inside);
            load4(wanted, returns, n, whole, inside);
            if (old_values != nullptr) load4(old, old_values, n, whole, inside);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                gradient[i] = target[group * 4 + i] = residual[group * 4 + i] = 0.0f;
                if (w[i] == 0.0f) continue;
                float error = value[i] - wanted[i], square = error * error;
                if (old_values != nullptr) {
                    const float top = old[i] + c.value_clip, bottom = old[i] - c.value_clip;
                    const float bounded = (value[i] > top ? top : value[i] < bottom ? bottom : value[i]) - wanted[i];
                    const bool clipped = (value[i] > top || value[i] < bottom) && bounded * bounded > square;
                    sums[kValueClipped] += clipped;
                    if (clipped) square = bounded * bounded, error = 0.0f;
                }
                gradient[i] = c.value_coef * w[i] * error;
                target[group * 4 + i] = wanted[i], residual[group * 4 + i] = wanted[i] - value[i];
                sums[kValueLoss] += w[i] * (0.5f * square);
                sums[kValue] += value[i];
                sums[kReturn] += wanted[i];
                sums[kResidual] += wanted[i] - value[i];
            }
            store4(values_grad, n, gradient, whole, inside);
        }
    }

#pragma unroll
    for (int row = 0; row < kSums; ++row) {
        const float sum = warp_sum(sums[row]);
        if (lane == 0) of_warp[row][warp] = sum;
    }
    negated_min = warp_max(negated_min), largest = warp_max(largest);
    if (lane == 0) of_warp[kNegatedMin][warp] = negated_min, of_warp[kMax][warp] = largest;
    __syncthreads();
    if (values != nullptr) {  // deviations about the block's means
        float count = 0.0f, mean = 0.0f, residual_mean = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) count += of_warp[kTokens][w], mean += of_warp[kReturn][w], residual_mean += of_warp[kResidual][w];
        mean /= fmaxf(count, 1.0f), residual_mean /= fmaxf(count, 1.0f);
        float rest = 0.0f, squares = 0.0f, residual_rest = 0.0f, residual_squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i) {
            const float a = live[i] ? target[i] - mean : 0.0f, b = live[i] ? residual[i] - residual_mean : 0.0f;
            rest += a, squares += a * a, residual_rest += b, residual_squares += b * b;
        }
        rest = warp_sum(rest), squares = warp_sum(squares), residual_rest = warp_sum(residual_rest), residual_squares = warp_sum(residual_squares);
        if (lane == 0) {
            of_warp[kReturnRest][warp] = rest, of_warp[kReturnSquares][warp] = squares;
            of_warp[kResidualRest][warp] = residual_rest, of_warp[kResidualSquares][warp] = residual_squares;
        }
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row < (values == nullptr ? kReturnRest : kRows)) {
        float total = of_warp[row][0];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) total = row == kNegatedMin || row == kMax ? fmaxf(total, of_warp[row][w]) : total + of_warp[row][w];
        partials[int64(row) * gridDim.x + blockIdx.x] = total;
    }
}

struct Moments {
    double mean, squares;
};

// Mean and sum of squared deviations of everything from those of the blocks, by one warp, in float64 (Chan's merge). The block's mean is its rounded
// value, formed again as it was there, and the rest.
__device__ __forceinline__ Moments merge(const float* partials, int blocks, int sum_row, int rest_row, double seen) {
    const float* counts = partials + int64(kTokens) * blocks;
    const float* sums = partials + int64(sum_row) * blocks;
    const float* rests = partials + int64(rest_row) * blocks;
    const float* squares = rests + blocks;
    double total = 0.0, spread = 0.0;
    for (int block = threadIdx.x % 32; block < blocks; block += 32) {
        total += double(counts[block]) * double(sums[block] / fmaxf(counts[block], 1.0f)) + double(rests[block]);
    }
    const double mean = warp_sum(total) / seen;
    for (int block = threadIdx.x % 32; block < blocks; block += 32) {
        const double count = counts[block], rest = rests[block], some = count > 0.0 ? count : 1.0;
        const double difference = double(sums[block] / fmaxf(counts[block], 1.0f)) + rest / some - mean;
        spread += double(squares[block]) - rest * (rest / some) + count * difference * difference;
    }
    return {mean, warp_sum(spread)};
}

extern "C" __global__ void __launch_bounds__(kThreads) combine(const float* partials, float* loss, float* stats, int blocks, int policy, int value,
                                                               float value_coef) {
    __shared__ double totals[kReturnRest];
    __shared__ double moments[2][2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int row = warp; row < kReturnRest; row += kWarps) {
        const float* from = partials + int64(row) * blocks;
        const bool maximum = row == kNegatedMin || row == kMax;
        double sum = 0.0;
        float largest = -infinity();
        for (int block = lane; block < blocks; block += 32) {
            if (maximum) {
                largest = fmaxf(largest, from[block]);
            } else {
                sum += double(from[block]);
            }
        }
        sum = maximum ? double(warp_max(largest)) : warp_sum(sum);
        if (lane == 0) totals[row] = sum;
    }
    __syncthreads();
    const double tokens = totals[kTokens], seen = tokens > 1.0 ? tokens : 1.0;
    if (value && warp < 2) {
        const Moments all = merge(partials, blocks, warp == 0 ? kReturn : kResidual, warp == 0 ? kReturnRest : kResidualRest, seen);
        if (lane == 0) moments[warp][0] = all.mean, moments[warp][1] = all.squares;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    double whole = 0.0;
    for (int i = 0; i < 22; ++i) stats[i] = 0.0f;
    if (policy) {
        const double ratios = totals[kRatio];
        const bool some = tokens > 0.0, finite = ratios == ratios;  // maxima drop NaN; the sum does not
        whole += totals[kLoss];
        stats[0] = float(totals[kLoss]);
        for (int i = kLow; i <= kK3; ++i) stats[i] = float(totals[i] / seen);
        stats[7] = some ? float(ratios / seen) : 1.0f;
        stats[8] = some ? float(finite ? -totals[kNegatedMin] : ratios) : 1.0f;
        stats[9] = some ? float(finite ? totals[kMax] : ratios) : 1.0f;
        stats[10] = some ? float(ratios * ratios / totals[kSquared]) : 0.0f;
        stats[11] = float(totals[kClamped] / seen);
        stats[12] = float(totals[kRefKl] / seen);
        stats[13] = float(totals[kEntropy] / seen);
        stats[14] = some ? float(totals[kCorrection] / seen) : 1.0f;
        stats[15] = float(tokens);
    }
    if (value) {
        const double return_mean = moments[0][0], spread = moments[0][1], resolution = 1.1920928955078125e-07 * return_mean;
        const bool varies = spread > seen * resolution * resolution;
        whole += double(value_coef) * totals[kValueLoss];
        stats[16] = float(totals[kValueLoss]);
        stats[17] = float(totals[kValueClipped] / seen);
        stats[18] = varies ? float(1.0 - moments[1][1] / spread) : 0.0f;
        stats[19] = float(totals[kValue] / seen);
        stats[20] = float(return_mean);
        stats[21] = float(tokens);
    }
    *loss = float(whole);
}
