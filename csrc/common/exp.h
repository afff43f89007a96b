// The exponential of a vector of floats: x = n·ln2 + r with |r| ≤ ln2 / 2, a polynomial for e^r, and 2^n.
//
// Error at most 2 ulp over the whole range, denormal results included (2.3 where there is no fused multiply-add). e^0
// is exactly 1; very negative numbers and −∞ give 0, overflow and +∞ give +∞, NaN passes. The split of ln2 is Cody and
// Waite's (1980): n times its upper part is exact without a fused multiply-add. The polynomial is minimax for the
// relative error, with the constant term held at 1.
#pragma once

#include "common/lanes.h"

namespace entrenar {
namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2Upper = 0.693359375f, kLn2Lower = -2.12194440e-4f;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 · 2^23: a float near it has no bits left below one

// value · 2^exponent for a whole number `exponent`; `shifted` is kRoundToInteger + exponent.
inline Floats times_power_of_two(Floats value, Floats exponent, Floats shifted) {
#if defined(__AVX512F__)
    (void)shifted;
    return _mm512_maskz_scalef_ps(0xFFFF, value, exponent);
#else
    (void)exponent;
    const Ints power = (Ints)shifted - (Ints)all(kRoundToInteger), half = power >> 1;  // two factors: 2^±150 is none
    return value * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
#endif
}

// e^x for x ≤ 88 (or NaN).
inline Floats exp_below_overflow(Floats x) {
    x = larger(all(-104.0f), x);  // where the result is 0
    const Floats shifted = fused(x, all(kLog2E), all(kRoundToInteger)), n = shifted - kRoundToInteger;
    const Floats r = fused(n, all(-kLn2Lower), fused(n, all(-kLn2Upper), x));
    Floats power = fused(all(0.008290283381938934f), r, all(0.04189809784293175f));
    power = fused(power, r, all(0.1666763722896576f));
    power = fused(power, r, all(0.4999914765357971f));
    power = fused(power, r, all(0.9999997019767761f));
    power = fused(power, r, all(1.0f));
    return times_power_of_two(power, n, shifted);
}

// e^x.
inline Floats exp(Floats x) { return exp_below_overflow(smaller(all(89.0f), x)); }

}  // namespace
}  // namespace entrenar
