// What the kernels share. Device code only, and no CUDA header: NVRTC compiles it with nothing but itself.
// Built for a GPU by NVRTC (kernels/runtime/nvrtc.py) or nvcc, and for a CPU in tests by g++ against csrc/simt/simt.h.
#pragma once

constexpr unsigned kAllLanes = 0xffffffffu;
using int64 = long long;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// 2 to the power x, 0 where that is no normal number; one instruction on a GPU.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef FUSEDRL_SIMT
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLeast = -290.0f;  // 2 to this power is 0, and not -inf times 0 of a masked logit

// Sums in a fixed tree: the same bits in every lane and on every run.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {  // drops NaN
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

// Sum over the block, for every thread. `scratch` holds one value a warp and may be used again after the next barrier.
template <int kWarps, class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x += scratch[warp];
    return x;
}

// Four consecutive tokens from t, a multiple of 4, on; `whole`: all four may be touched, else those that inside[] names.
__device__ __forceinline__ void load4(float out[4], const float* __restrict__ from, int64 t, bool whole, const bool inside[4]) {
    if (whole) {
        const float4 x = *reinterpret_cast<const float4*>(from + t);
        out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = inside[i] ? from[t + i] : 0.0f;
    }
}

__device__ __forceinline__ void store4(float* __restrict__ to, int64 t, const float x[4], bool whole, const bool inside[4]) {
    if (whole) {
        *reinterpret_cast<float4*>(to + t) = float4{x[0], x[1], x[2], x[3]};
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (inside[i]) to[t + i] = x[i];
        }
    }
}

// ---- 16-bit floats as their bits -----------------------------------------------------------------------------------------
__device__ __forceinline__ float from_bf16(unsigned bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ unsigned to_bf16(float x) {  // to the nearest, ties to even
#ifdef FUSEDRL_SIMT
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
#else
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

#ifndef FUSEDRL_SIMT  // csrc/simt/simt.h has its own
__device__ __forceinline__ float from_half(unsigned bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)bits));
    return x;
}

__device__ __forceinline__ unsigned to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

// ---- the elements of a source that is compiled for one dtype: DTYPE=0: float32; 1: bfloat16; 2: float16 -------------------------------
#ifdef DTYPE
#if DTYPE == 0
using Element = float;
#else
using Element = unsigned short;
#endif

__device__ __forceinline__ float widen(Element x) {
#if DTYPE == 0
    return x;
#elif DTYPE == 1
    return from_bf16(x);
#else
    return from_half(x);
#endif
}

__device__ __forceinline__ Element narrow(float x) {
#if DTYPE == 0
    return x;
#elif DTYPE == 1
    return Element(to_bf16(x));
#else
    return Element(to_half(x));
#endif
}
#endif
