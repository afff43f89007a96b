// The standard normal distribution of a vector of floats: its density φ and its cumulative function Φ, which is
// (1 + erf(x / √2)) / 2 without that formula's cancellation below zero.
//
// Φ(−a) = e^(−a²/2) · R(a) for a ≥ 0; R(a) is a polynomial in 4 / (a + 4), minimax for the relative error over all of
// Φ's range. Error of Φ at most 8 ulp, denormal results included; NaN passes.
#pragma once

#include "common/exp.h"

namespace entrenar {
namespace {

struct Normal {
    Floats cumulative, density;
};

// a² − square, where `square` is a² rounded; |a| ≤ 20.
inline Floats square_error(Floats a, Floats square) {
#if defined(__FMA__)
    return fused(a, a, -square);
#else
    const Floats upper = (Floats)((Ints)a & ~0xFFF), lower = a - upper;  // 12 bits each: their products are exact
    return ((upper * upper - square) + 2.0f * (upper * lower)) + lower * lower;
#endif
}

// R(a) of the head comment.
inline Floats tail_ratio(Floats a) {
    const Floats t = reciprocal(fused(a, all(0.25f), all(1.0f)));
    Floats ratio = fused(all(0.01695144735276699f), t, all(-0.06486573070287704f));
    ratio = fused(ratio, t, all(0.05667303502559662f));
    ratio = fused(ratio, t, all(0.021521031856536865f));
    ratio = fused(ratio, t, all(0.0186709463596344f));
    ratio = fused(ratio, t, all(0.08333052694797516f));
    ratio = fused(ratio, t, all(0.07319995015859604f));
    ratio = fused(ratio, t, all(0.09524601697921753f));
    ratio = fused(ratio, t, all(0.09952673316001892f));
    return fused(ratio, t, all(0.09974604099988937f)) * t;
}

inline Normal normal(Floats x) {
    const Floats a = smaller(all(20.0f), magnitude(x)), square = a * a;
    const Floats rough = exp_below_overflow(square * -0.5f);
    const Floats power = fused(rough * -0.5f, square_error(a, square), rough);  // e^(−a²/2)
    const Floats tail = power * tail_ratio(a);
    return {x < 0.0f ? tail : 1.0f - tail, power * 0.3989422804014327f};
}

}  // namespace
}  // namespace entrenar
