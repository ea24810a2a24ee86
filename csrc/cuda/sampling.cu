// sample: one block a row draws a token by inverse CDF; a second launch lists the kept ids where they are asked for.
//
// The mathematics and numerics are those of kernels/sampling/. A warp owns a segment of consecutive tokens and reads it with an online maximum of each
// lane, so that the one read of a row needs no barrier; the draw picks a segment by its sum and reads that segment again. Truncation has no sort: the key
// of the last token kept is searched for by its bits, two a pass, from sums over what lies at or above three keys; a pass that leaves one token to decide
// on is the last. top-p first collects the tokens that are not too light to be kept in shared memory; where they fit, all passes after that read no row. Which thread takes a token depends on its id alone, and sums have a fixed order: a row's bits do not depend on where it lies.
//
// Options   DTYPE=0: float32; 1: bfloat16; 2: float16.
// Bytes     V s a row, read once from memory and then from cache: 1 / kWarps of it to draw; two reads for top-p, which more where over kSurvivors tokens
//           survive; for top-k the passes of the search and one more.
#include "common.cuh"

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr float kSmallest = -87.0f;  // exp of less is not a normal float32: it counts as 0

constexpr int kBits = DTYPE == 0 ? 32 : DTYPE == 1 ? 16 : 20;  // leading bits of the float32 in which all logits differ
constexpr int kAhead = DTYPE == 0 ? 4 : 2;  // vectors of a thread that are read before the first of them is used; four of eight numbers would spill
constexpr int kWidth = 16 / sizeof(Element), kNone = -2147483647 - 1, kNoId = 2147483647;

struct alignas(16) Vector {
    Element at[kWidth];
};

struct Row {
    const Element* z;
    const unsigned char* suppress;  // or null
    int V;
    bool aligned;
    float top, inverse;  // the largest logit that may be drawn, and 1 / T

    // Logits from v on; -inf behind the end.
    __device__ __forceinline__ Vector fetch(int v) const {
        Vector x;
        if (aligned && v + kWidth <= V) {
            x = *reinterpret_cast<const Vector*>(z + v);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) x.at[i] = v + i < V ? z[v + i] : narrow(-infinity());
        }
        return x;
    }

    // The same as float32; c: of what may be drawn.
    __device__ __forceinline__ void widened(int v, const Vector& x, float all[kWidth], float c[kWidth]) const {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) all[i] = widen(x.at[i]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) c[i] = suppress != nullptr && v + i < V && suppress[v + i] ? -infinity() : all[i];
    }

    __device__ __forceinline__ void load(int v, float all[kWidth], float c[kWidth]) const { widened(v, fetch(v), all, c); }

    __device__ __forceinline__ float scaled(float c) const { return (c - top) * inverse; }
    __device__ __forceinline__ float weight(float c) const { return scaled(c) < kSmallest ? 0.0f : __expf(scaled(c)); }  // NaN stays

    // Tokens of a warp: segments begin where a warp's vectors do.
    __device__ __forceinline__ int segment() const { return (V + kWarps * 32 * kWidth - 1) / (kWarps * 32 * kWidth) * 32 * kWidth; }

    // f(v, all, c) for the vectors of this thread, in ascending order. kAhead of them are on the way at once: few rows are few blocks, whose one read of
    // a row would otherwise wait for one vector after the other.
    template <class F>
    __device__ __forceinline__ void walk(F f) const {
        constexpr int kStep = 32 * kWidth;
        const int begin = int(threadIdx.x / 32) * segment(), end = begin + segment() < V ? begin + segment() : V;
        int v = begin + int(threadIdx.x % 32) * kWidth;
        float all[kWidth], c[kWidth];
#pragma unroll 1
        for (; v + (kAhead - 1) * kStep < end; v += kAhead * kStep) {
            Vector x[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) x[i] = fetch(v + i * kStep);
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                widened(v + i * kStep, x[i], all, c);
                f(v + i * kStep, all, c);
            }
        }
#pragma unroll 1
        for (; v < end; v += kStep) {
            load(v, all, c);
            f(v, all, c);
        }
    }
};

// Integers in the order of the logits, 0 and -0 the same; and back.
__device__ __forceinline__ int key_of(float z) {
    const int bits = __float_as_int(z == 0.0f ? 0.0f : z);
    return (bits ^ (bits >> 31 & 0x7fffffff)) >> (32 - kBits);
}

__device__ __forceinline__ float logit_of(int key) {
    constexpr unsigned kLow = (1ull << (32 - kBits)) - 1;
    const unsigned bits = unsigned(key) << (32 - kBits) | (key < 0 ? kLow : 0u);
    return __uint_as_float(key < 0 ? bits ^ 0x7fffffffu : bits);
}

struct Sums {  // over some tokens: the maximum m, sum of e^d, sum of d e^d, with d = (z - m) / T
    float m = -infinity();
    double S = 0.0, W = 0.0;
};

// From maximum m to `base`; the shift of d is bounded, since beyond -200 the factor is 0 for what S can hold.
__device__ __forceinline__ void move_to(Sums& sums, float base, float inverse) {
    if (sums.m == base || sums.m == -infinity()) return;
    const double shift = fmaxf((sums.m - base) * inverse, -200.0f), factor = exp(shift);
    sums.W = factor * (sums.W + shift * sums.S);
    sums.S *= factor;
}

__device__ __forceinline__ Sums merge(Sums a, Sums b, float inverse) {
    const float m = fmaxf(a.m, b.m), base = m == -infinity() ? 0.0f : m;
    move_to(a, base, inverse);
    move_to(b, base, inverse);
    return {m, a.S + b.S, a.W + b.W};
}

struct Shared {  // of every warp; two of what is written pass after pass, so that one barrier separates writes from reads
    double segment[kWarps];  // sums of what may be drawn
    double of_warp[2][3][kWarps];
    int ids[2][2][kWarps];
    float top[2][kWarps];  // of all, of what may be drawn
    float lowest[kWarps];
    double S[kWarps], W[kWarps];
};

constexpr int kSurvivors = 4096;
constexpr double kMostP = 0.9999;  // beyond it nearly everything survives, and rounding decides

struct Survivors {  // of top-p: whatever can be kept, in an order that depends on the ids alone
    float logit[kSurvivors];
    int id[kSurvivors];
    int of_warp[kWarps];
};

__device__ __forceinline__ int warp_min(int x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, x, distance);
        x = other < x ? other : x;
    }
    return x;
}

// Sums over the block, for every thread. `turn` alternates.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&x)[kCount], Shared& shared, int& turn) {
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        x[i] = warp_sum(x[i]);
        if (threadIdx.x % 32 == 0) shared.of_warp[turn][i][threadIdx.x / 32] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        x[i] = 0.0;
#pragma unroll 1
        for (int warp = 0; warp < kWarps; ++warp) x[i] += shared.of_warp[turn][i][warp];
    }
}

__device__ __forceinline__ int block_min(int x, int slot, Shared& shared, int turn) {  // a barrier must follow the last use of this slot and turn
    x = warp_min(x);
    if (threadIdx.x % 32 == 0) shared.ids[turn][slot][threadIdx.x / 32] = x;
    __syncthreads();
    x = shared.ids[turn][slot][0];
    for (int warp = 1; warp < kWarps; ++warp) x = shared.ids[turn][slot][warp] < x ? shared.ids[turn][slot][warp] : x;
    return x;
}

// shared.segment: each warp's own sum.
__device__ __forceinline__ void set_segments(double x, Shared& shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.segment[threadIdx.x / 32] = x;
    __syncthreads();
}

// The first id at which the running sum of weight(v, c) exceeds `target`; the last of any weight where rounding leaves none. shared.segment holds the sums.
template <class F>
__device__ __forceinline__ int locate(const Row& row, double target, F weight, Shared& shared, int& turn) {
    int chosen = -1;
    double running = 0.0, before = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) {
        if (!(shared.segment[warp] > 0.0)) continue;
        chosen = warp, before = running;
        running += shared.segment[warp];
        if (running > target) break;
    }
    if (chosen < 0) return -1;
    running = before;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = chosen * row.segment();
    const int end = begin + row.segment() < row.V ? begin + row.segment() : row.V;
    int last = -1;
#pragma unroll 1
    for (int start = begin; start < end; start += kThreads * kWidth) {
        const int v = start + int(threadIdx.x) * kWidth;
        float w[kWidth] = {};
        double own = 0.0;
        if (v < end) {
            float all[kWidth], c[kWidth];
            row.load(v, all, c);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) w[i] = weight(v + i, c[i]), own += w[i];
        }
        double inclusive = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const double left = __shfl_up_sync(kAllLanes, inclusive, distance);
            if (lane >= distance) inclusive += left;
        }
        double sum = __shfl_up_sync(kAllLanes, inclusive, 1);
        if (lane == 0) sum = 0.0;
        turn ^= 1;
        if (lane == 31) shared.of_warp[turn][0][warp] = inclusive;
        __syncthreads();
        double total = running;
        for (int other = 0; other < kWarps; ++other) {
            if (other == warp) sum += total;
            total += shared.of_warp[turn][0][other];
        }
        int found = kNoId, highest = -1;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (w[i] > 0.0f) {
                sum += w[i], highest = v + i;
                if (found == kNoId && sum > target) found = v + i;
            }
        }
        found = block_min(found, 0, shared, turn);
        highest = -block_min(-highest, 1, shared, turn);
        if (found != kNoId) return found;
        last = highest > last ? highest : last;
        running = total;
    }
    return last;
}

struct Threshold {
    int key;
    double above;  // count or weight of what lies above the key
    bool decided;  // the key may lie between two tokens: all above or at it stay
};

// Puts the tokens that `survives` names into shared memory, of which this thread has `own`. Returns their number; if there are too many, none is written.
template <class F>
__device__ __forceinline__ int collect(const Row& row, int own, F survives, Survivors& survivors) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int place = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int left = __shfl_up_sync(kAllLanes, place, distance);
        if (lane >= distance) place += left;
    }
    if (lane == 31) survivors.of_warp[warp] = place;
    __syncthreads();
    place -= own;
    int total = 0;
    for (int other = 0; other < kWarps; ++other) {
        if (other == warp) place += total;
        total += survivors.of_warp[other];
    }
    if (total > kSurvivors) return total;
    row.walk([&](int v, const float*, const float* c) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (survives(c[i])) survivors.logit[place] = c[i], survivors.id[place++] = v + i;
        }
    });
    __syncthreads();
    return total;
}

// The largest key, not below `floor`, at or above which the candidates number (kMass: weigh) at least `target`. walk(f) calls f(logits, their number) for
// this thread's candidates.
template <bool kMass, class Walk>
__device__ __forceinline__ Threshold search(const Row& row, Walk walk, double target, int floor, Shared& shared, int& turn) {
    Threshold result = {kNone >> (32 - kBits), 0.0, false};
    double at_least = row.V, beyond = 0.0;  // candidates from the key on, and from the end of what is still open on
#pragma unroll 1
    for (int unit = 1 << (kBits - 2); unit > 0 && !result.decided; unit >>= 2) {
        const int t[3] = {result.key + unit, result.key + unit + unit, result.key + unit + unit + unit};
        int n[3] = {};
        double m[3] = {};
        walk([&](const float* c, int width) {
            float part[3] = {};
#pragma unroll
            for (int i = 0; i < width; ++i) {
                const int key = row.scaled(c[i]) >= kSmallest ? key_of(c[i]) : kNone;
                const float w = kMass ? row.weight(c[i]) : 0.0f;
#pragma unroll
                for (int j = 0; j < 3; ++j) {
                    n[j] += key >= t[j];
                    part[j] += key >= t[j] ? w : 0.0f;
                }
            }
#pragma unroll
            for (int j = 0; j < 3; ++j) m[j] += part[j];
        });
        double count[3] = {double(n[0]), double(n[1]), double(n[2])};
        block_sums(count, shared, turn);
        if (kMass) {
            block_sums(m, shared, turn);
        } else {
            m[0] = count[0], m[1] = count[1], m[2] = count[2];
        }
        bool open = true;  // until the first key that is not reached
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const bool reached = m[j] >= target || t[j] <= floor;
            if (open && reached) result.key = t[j], at_least = count[j];
            if (open && !reached) result.above = m[j], beyond = count[j];
            open = open && reached;
        }
        result.decided = kMass ? at_least - beyond == 1.0 : at_least == target;
    }
    return result;
}

// Philox 4x32-10 (Salmon et al., 2011): 53 random bits in [0, 1) for key (seed, request id, sample index, position).
__device__ __forceinline__ double uniform(const int64* key) {
    unsigned c0 = unsigned(key[1]), c1 = unsigned(key[1] >> 32), c2 = unsigned(key[2]), c3 = unsigned(key[3]);
    unsigned k0 = unsigned(key[0]), k1 = unsigned(key[0] >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const unsigned long long first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
        c0 = unsigned(second >> 32) ^ c1 ^ k0, c2 = unsigned(first >> 32) ^ c3 ^ k1;
        c1 = unsigned(second), c3 = unsigned(first);
    }
    return (double(c0 >> 5) * 67108864.0 + double(c1 >> 6)) / 9007199254740992.0;
}

// Parameters: one a row, or one for all (step 0); null: not asked for. cuts, or null: key and id of the last token kept, and the length of the row's list.
extern "C" __global__ void __launch_bounds__(kThreads, 1) sample(
    const Element* logits, const double* temperature, const double* top_k, const double* top_p, const double* min_p, const int64* keys,
    const unsigned char* suppress, int64* ids, float* logp, float* logp_processed, float* entropy, int64* kept_count, int* cuts, int V, int64 row_stride,
    int T_step, int k_step, int p_step, int m_step) {
    __shared__ Shared shared;
    __shared__ Survivors survivors;
    const int64 n = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int turn = 0;
    Row row;
    row.z = logits + n * row_stride, row.suppress = suppress == nullptr ? nullptr : suppress + n * V, row.V = V;
    row.aligned = reinterpret_cast<unsigned long long>(row.z) % 16 == 0;
    const float given = float(temperature[n * T_step]), T = given == 0.0f ? 1.0f : given;
    const bool greedy = given == 0.0f;
    row.inverse = fminf(1.0f / T, 3e38f);  // 0 times it stays 0

    // One read: the full distribution, by segments.
    Sums sums;
    float top_c = -infinity(), lowest = infinity();
    row.walk([&](int v, const float* all, const float* c) {
        float top = all[0];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            top = fmaxf(top, all[i]), top_c = fmaxf(top_c, c[i]);
            if (v + i < V) lowest = fminf(lowest, all[i]);
        }
        if (top > sums.m) move_to(sums, top, row.inverse), sums.m = top;
        const float base = sums.m == -infinity() ? 0.0f : sums.m;
        float S = 0.0f, W = 0.0f;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float d = (all[i] - base) * row.inverse, e = __expf(d);
            S += e, W += (e > 0.0f ? d : 0.0f) * e;
        }
        sums.S += S, sums.W += W;
    });
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const Sums other = {__shfl_xor_sync(kAllLanes, sums.m, distance), __shfl_xor_sync(kAllLanes, sums.S, distance),
                            __shfl_xor_sync(kAllLanes, sums.W, distance)};
        sums = merge(sums, other, row.inverse);
    }
    top_c = warp_max(top_c), lowest = -warp_max(-lowest);
    if (lane == 0) {
        shared.top[0][warp] = sums.m, shared.top[1][warp] = top_c, shared.lowest[warp] = lowest;
        shared.S[warp] = sums.S, shared.W[warp] = sums.W;
    }
    __syncthreads();
    const Sums own_segment = sums;
    sums = Sums();
#pragma unroll 1
    for (int other = 0; other < kWarps; ++other) {
        sums = merge(sums, {shared.top[0][other], shared.S[other], shared.W[other]}, row.inverse);
        top_c = fmaxf(top_c, shared.top[1][other]), lowest = fminf(lowest, shared.lowest[other]);
    }
    const float top = sums.m;
    row.top = top_c;
    if (sums.S != sums.S || top_c == -infinity()) {  // NaN or +inf, or nothing that may be drawn
        if (threadIdx.x == 0) {
            ids[n] = -1, kept_count[n] = 0;
            logp[n] = logp_processed[n] = entropy[n] = not_a_number();
            if (cuts != nullptr) cuts[3 * n + 2] = 0;
        }
        return;
    }

    // What each truncation asks of this row; all of them nothing: the sums are those of what can be drawn, unless some weights count as 0.
    double k = V, p = 1.0, m = 0.0;
    if (!greedy) {
        if (top_k != nullptr && top_k[n * k_step] > 0.0 && top_k[n * k_step] < V) k = floor(top_k[n * k_step]);
        if (top_p != nullptr) p = top_p[n * p_step];
        if (min_p != nullptr) m = min_p[n * m_step];
    }
    double total = sums.S;
    int count = V, dropped = 0, threshold = kNone, last = V;
    if (suppress == nullptr && k == V && p >= 1.0 && !(m > 0.0) && (lowest - top) * row.inverse >= kSmallest) {
        Sums own = own_segment;
        move_to(own, top, row.inverse);
        if (lane == 0) shared.segment[warp] = own.S;
        __syncthreads();
    } else {
        const auto walk_row = [&](auto f) { row.walk([&](int, const float*, const float* c) { f(c, kWidth); }); };
        int survived = kSurvivors + 1;  // more than fit: all passes read the row
        double seen = 0.0;              // tokens of probability, where survivors were counted
        double quota = V;  // of the tokens at the threshold
        if (k < V) {
            const Threshold by_k = search<false>(row, walk_row, k, kNone, shared, turn);
            threshold = by_k.key;
            if (!by_k.decided) quota = k - by_k.above;
        }
        if (p < 1.0) {
            // What is lighter than this weighs less than half of what top-p cuts off, taken together: it cannot be kept. All candidates weigh 1 or more.
            const float least = float((1.0 - p) * 0.5 / V * (k == V && suppress == nullptr ? sums.S : 1.0));
            const int from = threshold;
            const auto survives = [&](float c) { return row.weight(c) >= least && row.scaled(c) >= kSmallest && key_of(c) >= from; };
            double x[3] = {};  // the weight above the threshold, the tokens at it, the tokens of probability
            int own = 0;
            row.walk([&](int, const float* all, const float* c) {
                float part = 0.0f;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    const float w = row.weight(c[i]);
                    const int key = key_of(c[i]);
                    part += key > threshold ? w : 0.0f;
                    x[1] += key == threshold && w > 0.0f;
                    x[2] += (all[i] - top) * row.inverse >= kSmallest;
                    own += survives(c[i]);
                }
                x[0] += part;
            });
            block_sums(x, shared, turn);
            seen = x[2];
            if (p <= kMostP) survived = collect(row, own, survives, survivors);
            const double equals = x[1] < quota ? x[1] : quota;
            const double target = p * (x[0] + (equals > 0.0 ? equals * row.weight(logit_of(threshold)) : 0.0));
            const auto walk_survivors = [&](auto f) {
                for (int i = int(threadIdx.x); i < survived; i += kThreads) f(survivors.logit + i, 1);
            };
            const Threshold by_p = survived <= kSurvivors ? search<true>(row, walk_survivors, target, threshold, shared, turn)
                                                          : search<true>(row, walk_row, target, threshold, shared, turn);
            const float w = row.weight(logit_of(by_p.key));
            double share = V;
            if (!by_p.decided && w > 0.0f) share = fmax(ceil((target - by_p.above) / w), 1.0);
            quota = by_p.key > threshold || share < quota ? share : quota;
            threshold = by_p.key > threshold ? by_p.key : threshold;
        }
        if (quota < V) {  // the lower ids of a tie
            int equals = 0;
            const auto equal = [&](int, float c) { return key_of(c) == threshold && row.weight(c) > 0.0f ? 1.0f : 0.0f; };
            row.walk([&](int v, const float*, const float* c) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) equals += equal(v + i, c[i]) > 0.0f;
            });
            set_segments(equals, shared);
            last = locate(row, quota - 0.5, equal, shared, turn);
        }
        const float cut = m > 0.0 ? float(log(m)) : -infinity();
        double x[2] = {}, own = 0.0;  // kept, dropped; weight
        int low = kNoId;
        const auto keeps = [&](int v, float c, int key, float w) {
            return w > 0.0f && row.scaled(c) >= cut && (key > threshold || (key == threshold && v <= last));
        };
        if (survived <= kSurvivors) {  // a warp takes those of its segment
            for (int i = lane; i < survived; i += 32) {
                const float c = survivors.logit[i], w = row.weight(c);
                const int v = survivors.id[i], key = key_of(c);
                if (v / row.segment() != warp || !keeps(v, c, key, w)) continue;
                own += w;
                x[0] += 1.0;
                x[1] -= (c - top) * row.inverse >= kSmallest;
                low = key < low ? key : low;
            }
            if (threadIdx.x == 0) x[1] += seen;
        } else {
            row.walk([&](int v, const float* all, const float* c) {
                float part = 0.0f;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    const float w = row.weight(c[i]);
                    const int key = key_of(c[i]);
                    const bool keep = keeps(v + i, c[i], key, w);
                    part += keep ? w : 0.0f;
                    x[0] += keep;
                    x[1] += !keep && (all[i] - top) * row.inverse >= kSmallest;
                    low = keep && key < low ? key : low;
                }
                own += part;
            });
        }
        set_segments(own, shared);
        block_sums(x, shared, turn);
        count = int(x[0]), dropped = int(x[1]);
        low = block_min(low, 0, shared, turn);
        if (low != threshold) last = V;  // what cuts by value cuts between keys
        threshold = low;
        total = 0.0;
        for (int other = 0; other < kWarps; ++other) total += shared.segment[other];
    }

    int token;
    if (greedy) {
        int first = kNoId;
        row.walk([&](int v, const float*, const float* c) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) first = c[i] == top_c && v + i < first ? v + i : first;
        });
        token = block_min(first, 1, shared, turn);
    } else {
        const auto weight = [&](int v, float c) {
            const int key = key_of(c);
            return key > threshold || (key == threshold && v <= last) ? row.weight(c) : 0.0f;
        };
        token = locate(row, uniform(keys + 4 * n) * total, weight, shared, turn);
    }
    if (threadIdx.x != 0) return;
    const double z = widen(row.z[token]), log_S = log(sums.S), full = (z - top) / T - log_S;
    ids[n] = token, kept_count[n] = count;
    logp[n] = float(full);
    logp_processed[n] = dropped == 0 ? float(full) : float((z - top_c) / T - log(total));
    entropy[n] = float(log_S - sums.W / sums.S);
    if (cuts != nullptr) cuts[3 * n] = threshold, cuts[3 * n + 1] = last, cuts[3 * n + 2] = dropped == 0 ? 0 : count;
}

// The lists one behind the other; from the first row that does not fit on, none, and the token of such a row is -1.
extern "C" __global__ void __launch_bounds__(kThreads) list_kept(
    const Element* logits, const unsigned char* suppress, const int* cuts, int64* ids, int* kept_ids, int64* offsets, int V, int64 row_stride, int64 capacity) {
    __shared__ int64 of_warp[kWarps];
    __shared__ int counts[2][kWarps];
    const int64 n = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = cuts[3 * n + 2];
    int64 place = 0;
    for (int64 other = threadIdx.x; other < n; other += kThreads) place += cuts[3 * other + 2];
    place = block_sum<kWarps>(place, of_warp);
    const bool fits = place + own <= capacity;
    if (threadIdx.x == 0) {
        int64 end = place + own;
        if (!fits) {
            end = 0;
            for (int64 other = 0; other <= n && end + cuts[3 * other + 2] <= capacity; ++other) end += cuts[3 * other + 2];
            if (own > 0) ids[n] = -1;
        }
        if (n == 0) offsets[0] = 0;
        offsets[n + 1] = end;
    }
    if (own == 0 || !fits) return;
    Row row;
    row.z = logits + n * row_stride, row.suppress = suppress == nullptr ? nullptr : suppress + n * V, row.V = V;
    row.aligned = reinterpret_cast<unsigned long long>(row.z) % 16 == 0;
    const int threshold = cuts[3 * n], last = cuts[3 * n + 1];
    int turn = 0;
#pragma unroll 1
    for (int start = 0; start < V; start += kThreads * kWidth) {
        const int v = start + int(threadIdx.x) * kWidth;
        unsigned kept = 0;
        if (v < V) {
            float all[kWidth], c[kWidth];
            row.load(v, all, c);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const int key = key_of(c[i]);
                kept |= unsigned(v + i < V && (key > threshold || (key == threshold && v + i <= last))) << i;
            }
        }
        const int count = __popc(kept);
        int inclusive = count;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int left = __shfl_up_sync(kAllLanes, inclusive, distance);
            if (lane >= distance) inclusive += left;
        }
        turn ^= 1;
        if (lane == 31) counts[turn][warp] = inclusive;
        __syncthreads();
        int64 at = place + inclusive - count;
        for (int other = 0; other < kWarps; ++other) {
            if (other < warp) at += counts[turn][other];
            place += counts[turn][other];
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (kept >> i & 1u) kept_ids[at++] = v + i;
        }
    }
}
