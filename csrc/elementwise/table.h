// The table of kernels of the path whose file includes this.
#pragma once

#include "elementwise/cross_entropy.h"
#include "elementwise/gated_activation.h"
#include "elementwise/kernels.h"
#include "elementwise/rms_norm.h"
#include "elementwise/rotary.h"

namespace entrenar {
namespace {

// For the tests of common/exp.h, tanh.h and normal.h: every float32 there is.
void function(const void* in, int64_t count, int which, void* out) {
    const void* const from[] = {in};
    void* const to[] = {out};
    map_pairs<kFloat32, 1, 1>(from, to, count, 0.0f, [&](int64_t, const Pair* x, Pair* results) ENTRENAR_INLINE {
        results[0] = which == kExp    ? Pair{exp(x[0].a), exp(x[0].b)}
                     : which == kTanh ? Pair{tanh(x[0].a), tanh(x[0].b)}
                                      : Pair{normal(x[0].a).cumulative, normal(x[0].b).cumulative};
    });
}

constexpr Elementwise kElementwise = {
    prepare_weight, rms_norm, rms_norm_backward, reciprocal_norms, rms_norm_backward_weight,
    rotate,         gated,    gated_backward,    cross_entropy,    function,
};

}  // namespace
}  // namespace entrenar
