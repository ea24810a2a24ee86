// The objectives of the policy loss: their kinds, their coefficients and the mathematics of a token, for numbers of any type. Compiled by g++ for a
// processor's lanes (csrc/cpu/include/policy_terms.h) and by NVRTC for a GPU (csrc/cuda/policy_value_loss.cu).
//
// A kind is named as in PolicyObjective (kernels/objective.py), an estimator as in KL_ESTIMATORS, and coefficients come in the order of COEFFICIENTS
// there; a test holds the lists equal. A new objective is a row of FUSEDRL_KINDS and a branch of policy_term here.
//
// Math says what numbers are:  Number, Mask = Number < Number, and
//                              choose(mask, a, b)  magnitude(x)  exponential(x)  clamped(x): within +-20
//                              expand(d, excess): e^clamped(d), and in `excess` that - 1 - d, free of cancellation; 1 and 0 exactly at d = 0
#pragma once

#define FUSEDRL_KINDS(ROW) \
    ROW(clip) ROW(ratio) ROW(reinforce) ROW(kl_penalty) ROW(gspo) ROW(cispo) ROW(sapo) ROW(geometric_mean) ROW(dro)

#define FUSEDRL_KL_ESTIMATORS(ROW) ROW(k1) ROW(k2) ROW(k3) ROW(abs) ROW(sequence_k2)

// What a kind does not use is neutral: infinite bounds, tau 1, beta 0.
#define FUSEDRL_COEFFICIENTS(ROW) \
    ROW(lower) ROW(upper) ROW(dual) ROW(tau_positive) ROW(tau_negative) ROW(beta) ROW(kl_coef) ROW(entropy_coef) ROW(value_clip) ROW(value_coef)

#ifdef __CUDACC__
#define FUSEDRL_TERM __device__ __forceinline__
#else
#define FUSEDRL_TERM inline
#endif

namespace objectives {

#define FUSEDRL_NAME(name) name,
enum class Kind { FUSEDRL_KINDS(FUSEDRL_NAME) };
enum class Kl { FUSEDRL_KL_ESTIMATORS(FUSEDRL_NAME) };
#undef FUSEDRL_NAME

template <class Number>
struct Coefficients {
#define FUSEDRL_FIELD(name) Number name;
    FUSEDRL_COEFFICIENTS(FUSEDRL_FIELD)
#undef FUSEDRL_FIELD
};

// The kinds whose token takes log s from its sequence.
FUSEDRL_TERM constexpr bool by_sequence(Kind kind) { return kind == Kind::gspo || kind == Kind::geometric_mean; }

template <class Math>
struct Token {
    typename Math::Number advantage, logp, d, ratio, excess, log_s;  // d = logp - old_logp, ratio = e^d, excess = ratio - 1 - d
    typename Math::Mask live, beyond;                                // beyond: |d| > 20
};

// The term is rest - advantage bounded, and its derivative by logp rest_slope - advantage slope.
template <class Math>
struct Term {
    typename Math::Number bounded, slope, rest, rest_slope;
    typename Math::Mask high, low, too_far;  // tokens that a bound stopped
};

template <Kind kind, class Math>
FUSEDRL_TERM Term<Math> policy_term(const Coefficients<typename Math::Number>& c, const Token<Math>& t) {
    using Number = typename Math::Number;
    using Mask = typename Math::Mask;
    const Number zero(0.0f), one(1.0f);
    const Mask none(0.0f), gains = t.advantage > zero, loses = t.advantage < zero;
    Term<Math> out{t.ratio, Math::choose(t.beyond, zero, t.ratio), zero, zero, none, none, none};
    if constexpr (kind == Kind::clip || kind == Kind::gspo) {
        Number r = t.ratio;
        Mask cut = t.beyond;
        if constexpr (kind == Kind::gspo) {
            Number unused;
            r = Math::expand(t.log_s, unused);
            cut = Math::magnitude(t.log_s) > Number(20.0f);
        }
        out.high = gains & (r > c.upper);
        out.too_far = loses & (r > c.dual);
        out.low = loses & (r < c.lower);
        out.bounded = Math::choose(out.too_far, c.dual, Math::choose(out.low, c.lower, Math::choose(out.high, c.upper, r)));
        out.slope = Math::choose(out.high | out.low | out.too_far | cut, zero, r);
    } else if constexpr (kind == Kind::geometric_mean) {
        Number unused;
        out.bounded = Math::expand(t.log_s, unused);
        out.high = gains & (t.d > c.upper);
        out.low = loses & (t.d < c.lower);
        out.slope = Math::choose(out.high | out.low | (Math::magnitude(t.log_s) > Number(20.0f)), zero, out.bounded);
    } else if constexpr (kind == Kind::reinforce) {
        out.bounded = t.logp;
        out.slope = one;
    } else if constexpr (kind == Kind::kl_penalty) {
        out.rest = c.beta * t.excess;
        out.rest_slope = Math::choose(t.beyond, zero, c.beta * (t.excess + t.d));
    } else if constexpr (kind == Kind::cispo) {
        out.high = t.live & (t.ratio > c.upper);
        out.slope = Math::choose(out.high, c.upper, t.ratio);
        out.bounded = out.slope * t.logp;
    } else if constexpr (kind == Kind::sapo) {
        const Number tau = Math::choose(gains, c.tau_positive, c.tau_negative), x = tau * (one - t.ratio), most(80.0f), least(-80.0f);
        const Number e = Math::exponential(Math::choose(x < least, least, Math::choose(x > most, most, x))), sigmoid = one / (one + e);
        out.bounded = Number(4.0f) / tau * sigmoid;
        out.slope = Math::choose(t.beyond, zero, Number(4.0f) * sigmoid * (e * sigmoid) * t.ratio);
    } else if constexpr (kind == Kind::dro) {
        out.bounded = t.logp;
        out.slope = one;
        out.rest = Number(0.5f) * c.beta * t.d * t.d;
        out.rest_slope = c.beta * t.d;
    }
    return out;
}

// An estimate of KL(pi || ref) from k = logp - ref_logp; sum: of its sequence's k.
template <class Math>
FUSEDRL_TERM typename Math::Number kl_value(Kl estimator, const typename Math::Number& k, const typename Math::Number& sum) {
    using Number = typename Math::Number;
    switch (estimator) {
        case Kl::k1: return k;
        case Kl::k2: return Number(0.5f) * k * k;
        case Kl::abs: return Math::magnitude(k);
        case Kl::sequence_k2: return Number(0.5f) * k * sum;
        case Kl::k3: break;
    }
    Number excess;
    Math::expand(-k, excess);
    return excess;
}

// The derivative of an estimate by logp; k3's is 0 beyond the clamp.
template <class Math>
FUSEDRL_TERM typename Math::Number kl_slope(Kl estimator, const typename Math::Number& k, const typename Math::Number& sum) {
    using Number = typename Math::Number;
    const Number zero(0.0f), one(1.0f);
    switch (estimator) {
        case Kl::k1: return one;
        case Kl::k2: return k;
        case Kl::abs: return Math::choose(k < zero, -one, Math::choose(k > zero, one, k));
        case Kl::sequence_k2: return sum;
        case Kl::k3: break;
    }
    Number excess;
    Math::expand(-k, excess);
    return Math::choose(Math::magnitude(k) > Number(20.0f), zero, k - excess);  // 1 - e^-k = k - (e^-k - 1 + k)
}

}  // namespace objectives
