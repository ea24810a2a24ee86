// exp(x) and exp(x) - 1 on a bounded range, in a third of the vector library's instructions. x = n ln 2 + f with |f| <= ln 2 / 2 (ln 2 in two parts, the first
// of which n multiplies exactly); exp(f) - 1 by its Taylor polynomial; 2^n by its bits. Within 1.5 units in the last place. NaN stays.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace {

struct Exponential {
  at::vec::Vectorized<float> power, rest;  // exp(x) = power (1 + rest)

  explicit Exponential(const at::vec::Vectorized<float>& x) : power(1.0f), rest(0.0f) {  // |x| < 87
    using Vec = at::vec::Vectorized<float>;
    using Bits = at::vec::Vectorized<int32_t>;
    const Vec n = (x * Vec(1.44269504f)).round();
    const Vec f = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), x));
    Vec p(1.98412698e-4f);
    for (const float term : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f}) p = at::vec::fmadd(p, f, Vec(term));
    rest = at::vec::fmadd(f * f, p, f);
    power = at::vec::cast<float>((at::vec::convert_to_int_of_same_size(n) + Bits(127)) << Bits(23));  // of NaN any number: rest is NaN
  }
};

inline at::vec::Vectorized<float> expm1_bounded(const at::vec::Vectorized<float>& x) {
  const Exponential e(x);
  return at::vec::fmadd(e.power, e.rest, e.power - at::vec::Vectorized<float>(1.0f));
}

// exp(x) for x <= 0, down to the smallest number there is: the square of exp(x / 2), which is a normal number wherever its square is one at all. Within 4 units in
// the last place.
inline at::vec::Vectorized<float> exp_nonpositive(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  const Exponential e(at::vec::clamp_min(x * Vec(0.5f), Vec(-60.0f)));
  const Vec root = at::vec::fmadd(e.power, e.rest, e.power);
  return root * root;
}

}  // namespace
