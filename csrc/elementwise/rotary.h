// Rotary position embedding (Su et al. 2021) in the half-split order of Hugging Face's checkpoints, and its transpose.
//
// With the rotated part of a head as two halves, and cos and sin likewise:
//   forward    y₁ = x₁·cos₁ − x₂·sin₁    y₂ = x₂·cos₂ + x₁·sin₂
//   transpose  y₁ = x₁·cos₁ + x₂·sin₂    y₂ = x₂·cos₂ − x₁·sin₁
#pragma once

#include "common/pairs.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

// Both maps as y₁ = x₁·direct₁ + x₂·crossed₁, y₂ = x₂·direct₂ + x₁·crossed₂, for a piece of the halves.
constexpr int64_t kPieceElements = 256;

struct Coefficients {
    float direct[2][kPieceElements], crossed[2][kPieceElements];
};

template <int kDtype>
void read_coefficients(const Rotation& rotation, int64_t row, int64_t first, int64_t count, Coefficients& to) {
    const int64_t half = rotation.rotated / 2, begin = row * rotation.rotated + first;
    const int upper = rotation.transpose ? 1 : 0;  // where crossed₁ comes from
    for (int side = 0; side < 2; ++side) {
        widen_in_order<kDtype>(rotation.cos, rotation.cos_dtype, begin + side * half, count, to.direct[side]);
        widen_in_order<kDtype>(rotation.sin, rotation.cos_dtype, begin + side * half, count, to.crossed[side ^ upper]);
    }
    for (int64_t i = 0; i < padded(count); ++i) to.crossed[upper][i] = -to.crossed[upper][i];
}

template <int kDtype>
inline void rotate_piece(const char* x, char* out, int64_t half, int64_t first, int64_t count, const Coefficients& by) {
    const void* const in[] = {x + first * kBytes<kDtype>, x + (half + first) * kBytes<kDtype>};
    void* const to[] = {out + first * kBytes<kDtype>, out + (half + first) * kBytes<kDtype>};
    map_pairs<kDtype, 2, 2>(in, to, count, 0.0f, [&](int64_t at, const Pair* from, Pair* results) ENTRENAR_INLINE {
        for (int side = 0; side < 2; ++side) {
            const Pair direct = load_floats(by.direct[side] + at), crossed = load_floats(by.crossed[side] + at);
            const Pair &same = from[side], &other = from[1 - side];
            results[side] = {fused(other.a, crossed.a, same.a * direct.a),
                             fused(other.b, crossed.b, same.b * direct.b)};
        }
    });
}

// All heads of one position.
template <int kDtype>
void rotate_position(const Rotation& rotation, int64_t batch, int64_t token) {
    const int64_t half = rotation.rotated / 2, width = rotation.width * kBytes<kDtype>;
    const int64_t rest = (rotation.width - rotation.rotated) * kBytes<kDtype>;
    const char* x = static_cast<const char*>(rotation.x) +
                    (batch * rotation.batch_stride + token * rotation.token_stride) * kBytes<kDtype>;
    char* out = static_cast<char*>(rotation.out) + (batch * rotation.tokens + token) * rotation.heads * width;
    const int64_t row = (rotation.cos_batches == 1 ? 0 : batch) * rotation.tokens + token;
    Coefficients by;
    for (int64_t first = 0; first < half; first += kPieceElements) {
        const int64_t count = half - first < kPieceElements ? half - first : kPieceElements;
        read_coefficients<kDtype>(rotation, row, first, count, by);
        for (int64_t head = 0; head < rotation.heads; ++head) {
            rotate_piece<kDtype>(x + head * rotation.head_stride * kBytes<kDtype>, out + head * width, half, first,
                                 count, by);
        }
    }
    if (rest == 0) return;
    for (int64_t head = 0; head < rotation.heads; ++head) {
        const char* from = x + (head * rotation.head_stride + rotation.rotated) * kBytes<kDtype>;
        std::memcpy(out + (head + 1) * width - rest, from, static_cast<size_t>(rest));
    }
}

void rotate(const Rotation& rotation, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
        ENTRENAR_FOR_DTYPE(rotation.dtype, rotate_position, rotation, at / rotation.tokens, at % rotation.tokens);
    }
}

}  // namespace
}  // namespace entrenar
