// Gated activations (Shazeer 2020): act(gate) · up, where act(x) = x · factor(x), and the gradients of both.
//
// silu: factor σ(x). gelu (Hendrycks and Gimpel 2016): Φ(x). gelu_tanh: (1 + tanh u) / 2 = σ(2u) with
// u = √(2/π) · (x + 0.044715 x³).
#pragma once

#include "common/exp.h"
#include "common/normal.h"
#include "common/pairs.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

// act(x) = x · factor; slope is act'(x).
struct Activated {
    Floats factor, slope;
};

// σ(v) = e^v / (1 + e^v) and σ(−v) = 1 / (1 + e^v), each with the relative accuracy of e^v; and v itself, clamped where
// σ(−v) is next to nothing, for products with that.
struct Logistic {
    Floats of, of_negated, argument;
};

inline Logistic logistic(Floats v) {
    const Floats clamped = smaller(all(87.0f), v), power = exp_below_overflow(clamped);
    const Floats rest = reciprocal(power + 1.0f);
    return {power * rest, rest, clamped};
}

template <int kKind>
inline Activated activated(Floats x) {
    if constexpr (kKind == kSilu) {
        const Logistic sigma = logistic(x);
        return {sigma.of, fused(sigma.argument * sigma.of_negated, sigma.of, sigma.of)};
    } else if constexpr (kKind == kGelu) {
        const Normal at = normal(x);
        return {at.cumulative, fused(x, at.density, at.cumulative)};
    } else {
        constexpr float kScale = 1.5957691216057308f, kCube = kScale * 0.044715f;               // 2√(2/π)
        const Floats near = smaller(all(20.0f), larger(all(-20.0f), x)), square = near * near;  // beyond: 0 and 1
        const Logistic sigma = logistic(near * fused(square, all(kCube), all(kScale)));
        const Floats steepness = fused(square, all(3.0f * kCube), all(kScale));
        return {sigma.of, fused(near * steepness * sigma.of_negated, sigma.of, sigma.of)};
    }
}

template <int kDtype, int kKind>
void gate_elements(const void* gate, const void* up, int64_t count, void* out) {
    const void* const in[] = {gate, up};
    void* const to[] = {out};
    map_pairs<kDtype, 2, 1>(in, to, count, 0.0f, [](int64_t, const Pair* from, Pair* results) ENTRENAR_INLINE {
        results[0] = {from[0].a * activated<kKind>(from[0].a).factor * from[1].a,
                      from[0].b * activated<kKind>(from[0].b).factor * from[1].b};
    });
}

// Gradients of gate and up in one vector of elements.
struct GateGradients {
    Floats gate, up;
};

template <int kKind>
inline GateGradients gradients(Floats grad, Floats gate, Floats up) {
    const Activated act = activated<kKind>(gate);
    return {grad * up * act.slope, grad * (gate * act.factor)};
}

template <int kDtype, int kKind>
void gate_gradients(const void* grad, const void* gate, const void* up, int64_t count, void* dgate, void* dup) {
    const void* const in[] = {grad, gate, up};
    void* const to[] = {dgate, dup};
    map_pairs<kDtype, 3, 2>(in, to, count, 0.0f, [](int64_t, const Pair* from, Pair* results) ENTRENAR_INLINE {
        const GateGradients a = gradients<kKind>(from[0].a, from[1].a, from[2].a);
        const GateGradients b = gradients<kKind>(from[0].b, from[1].b, from[2].b);
        results[0] = {a.gate, b.gate};
        results[1] = {a.up, b.up};
    });
}

template <int kDtype>
void gate_kind(const void* gate, const void* up, int64_t count, int kind, void* out) {
    const auto chosen = kind == kSilu   ? gate_elements<kDtype, kSilu>
                        : kind == kGelu ? gate_elements<kDtype, kGelu>
                                        : gate_elements<kDtype, kGeluTanh>;
    chosen(gate, up, count, out);
}

template <int kDtype>
void gate_kind_gradients(const void* grad, const void* gate, const void* up, int64_t count, int kind, void* dgate,
                         void* dup) {
    const auto chosen = kind == kSilu   ? gate_gradients<kDtype, kSilu>
                        : kind == kGelu ? gate_gradients<kDtype, kGelu>
                                        : gate_gradients<kDtype, kGeluTanh>;
    chosen(grad, gate, up, count, dgate, dup);
}

void gated(const void* gate, const void* up, int64_t count, int kind, void* out, int dtype) {
    ENTRENAR_FOR_DTYPE(dtype, gate_kind, gate, up, count, kind, out);
}

void gated_backward(const void* grad, const void* gate, const void* up, int64_t count, int kind, void* dgate, void* dup,
                    int dtype) {
    ENTRENAR_FOR_DTYPE(dtype, gate_kind_gradients, grad, gate, up, count, kind, dgate, dup);
}

}  // namespace
}  // namespace entrenar
