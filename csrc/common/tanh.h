// The hyperbolic tangent of a vector of floats: tanh u = (e^2u − 1) / (e^2u + 1), with e^2u − 1 computed without
// cancellation. Error at most 3.2 ulp; ±∞ gives ±1, a denormal itself, NaN passes.
#pragma once

#include "common/exp.h"

namespace entrenar {
namespace {

// e^x − 1 for 0 ≤ x ≤ 20 (or NaN): as in exp.h, but the polynomial is minimax for the relative error of e^r − 1.
inline Floats exp_minus_one(Floats x) {
    const Floats shifted = fused(x, all(kLog2E), all(kRoundToInteger)), n = shifted - kRoundToInteger;
    const Floats r = fused(n, all(-kLn2Lower), fused(n, all(-kLn2Upper), x));
    Floats q = fused(all(0.001388251781463623f), r, all(0.0083665382117033f));
    q = fused(q, r, all(0.04166720062494278f));
    q = fused(q, r, all(0.1666654348373413f));
    q = fused(q, r, all(0.4999999701976776f));
    q = fused(q * r, r, r);
    const Ints power = (Ints)shifted - (Ints)all(kRoundToInteger);
    const auto two_to_n = (Floats)((power + 127) << 23);
    return fused(two_to_n, q, two_to_n - 1.0f);
}

inline Floats tanh(Floats u) {
    const Floats doubled = smaller(all(20.0f), magnitude(u) * 2.0f);  // tanh 10 rounds to 1
    const Floats grown = exp_minus_one(doubled), size = grown * reciprocal(grown + 2.0f);
    return (Floats)((Ints)size | ((Ints)u & INT32_MIN));
}

}  // namespace
}  // namespace entrenar
