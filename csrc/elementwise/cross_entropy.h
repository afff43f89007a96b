// Cross-entropy of one row of logits, and in their place its gradient, softmax − one-hot.
//
// The row is read a tile at a time; Σ e^(z − largest so far) is rescaled where the largest grows (Milakov and
// Gimelshein 2018). The exponentials stay in a float32 scratch, so that the gradient is one multiplication an element.
// With a softcap (Gemma 2, section 2) z = cap · tanh(x / cap) stays there instead, and the gradient is that of x.
#pragma once

#include <math.h>
#include <cfloat>

#include "common/pairs.h"
#include "common/tanh.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

struct SoftmaxSums {
    float chosen = 0.0f;       // z of the label
    float largest = -FLT_MAX;  // not −∞: the exponentials of a tile of −∞ are then 0 and not NaN
    double total = 0.0;        // Σ e^(z − largest)

    void add(float largest_of_tile, float sum_of_tile) {
        if (largest_of_tile > largest) {
            total *= ::exp(static_cast<double>(largest) - largest_of_tile);
            largest = largest_of_tile;
        }
        total += sum_of_tile;
    }
};

// values[…] = z of a tile; returns the largest, NaN aside. The last pair is filled with −∞.
template <int kDtype, bool kCapped>
inline float read_tile(const void* logits, int64_t count, float softcap, float* values) {
    const float inverse = 1.0f / softcap;
    Pair most{all(-FLT_MAX), all(-FLT_MAX)};
    const void* const in[] = {logits};
    map_pairs<kDtype, 1, 0>(in, nullptr, count, -INFINITY, [&](int64_t at, const Pair* from, Pair*) ENTRENAR_INLINE {
        Pair z = from[0];
        if constexpr (kCapped) z = {tanh(z.a * inverse) * softcap, tanh(z.b * inverse) * softcap};
        store_floats(values + at, z);
        most = {larger(z.a, most.a), larger(z.b, most.b)};
    });
    if constexpr (kCapped) {
        for (int64_t i = count; i < padded(count); ++i) values[place_of<kDtype>(i)] = -INFINITY;
    }
    return largest(larger(most.a, most.b));
}

// Σ e^(value − shift); kKeep leaves the exponentials in place of the values. Meanwhile the logits after this tile are
// fetched: reading alternates with computing, and the processor's own prefetch stops at each page.
template <int kDtype, bool kKeep>
inline float sum_exponentials(float* values, int64_t count, float shift, const char* next) {
    Pair sums{};
    for (int64_t at = 0; at < count; at += kPair) {
        for (int64_t line = 0; line < kPair * kBytes<kDtype>; line += 64) {
            __builtin_prefetch(next + at * kBytes<kDtype> + line);
        }
        const Pair z = load_floats(values + at);
        const Pair e{exp_below_overflow(z.a - shift), exp_below_overflow(z.b - shift)};
        if constexpr (kKeep) store_floats(values + at, e);
        sums = {sums.a + e.a, sums.b + e.b};
    }
    return sum(sums.a + sums.b);
}

// scratch: null, or the values of the row and then the `largest` that each tile's exponentials are relative to.
template <int kDtype, bool kCapped>
SoftmaxSums read_row(const char* logits, int64_t columns, int64_t label, float softcap, float* scratch) {
    alignas(64) float tile[kTileLogits];
    SoftmaxSums sums;
    for (int64_t begin = 0; begin < columns; begin += kTileLogits) {
        const int64_t count = columns - begin < kTileLogits ? columns - begin : kTileLogits;
        float* values = scratch ? scratch + begin : tile;
        const char* from = logits + begin * kBytes<kDtype>;
        const float most = read_tile<kDtype, kCapped>(from, count, softcap, values);
        if (label >= begin && label < begin + count) sums.chosen = values[place_of<kDtype>(label - begin)];
        const float shift = most > sums.largest ? most : sums.largest;
        const char* next = from + count * kBytes<kDtype>;
        sums.add(shift, sum_exponentials<kDtype, !kCapped>(values, count, shift, next));
        if (scratch) scratch[padded(columns) + begin / kTileLogits] = shift;
    }
    return sums;
}

// The gradient of the first `count` logits of a tile.
template <int kDtype>
inline void write_tile(const float* exponentials, int64_t count, float factor, void* logits) {
    void* const to[] = {logits};
    map_pairs<kDtype, 0, 1>(nullptr, to, count, 0.0f, [&](int64_t at, const Pair*, Pair* results) ENTRENAR_INLINE {
        const Pair e = load_floats(exponentials + at);
        results[0] = {e.a * factor, e.b * factor};
    });
}

// p(z) · (1 − (z / cap)²).
inline Floats capped_gradient(Floats z, float largest, float inverse_total, float inverse_cap) {
    const Floats t = z * inverse_cap;
    return exp_below_overflow(z - largest) * inverse_total * fused(-t, t, all(1.0f));
}

template <int kDtype>
inline void write_capped_tile(const float* z, int64_t count, const SoftmaxSums& sums, float softcap, void* logits) {
    const float inverse_total = static_cast<float>(1.0 / sums.total), inverse_cap = 1.0f / softcap;
    void* const to[] = {logits};
    map_pairs<kDtype, 0, 1>(nullptr, to, count, 0.0f, [&](int64_t at, const Pair*, Pair* results) ENTRENAR_INLINE {
        const Pair capped = load_floats(z + at);
        results[0] = {capped_gradient(capped.a, sums.largest, inverse_total, inverse_cap),
                      capped_gradient(capped.b, sums.largest, inverse_total, inverse_cap)};
    });
}

template <int kDtype, bool kCapped>
void write_row(const float* scratch, int64_t columns, const SoftmaxSums& sums, float softcap, char* logits) {
    for (int64_t begin = 0; begin < columns; begin += kTileLogits) {
        const int64_t count = columns - begin < kTileLogits ? columns - begin : kTileLogits;
        void* tile = logits + begin * kBytes<kDtype>;
        if constexpr (kCapped) {
            write_capped_tile<kDtype>(scratch + begin, count, sums, softcap, tile);
        } else {
            const double shift = scratch[padded(columns) + begin / kTileLogits];
            const double scale = shift == sums.largest ? 1.0 : ::exp(shift - sums.largest);
            write_tile<kDtype>(scratch + begin, count, static_cast<float>(scale / sums.total), tile);
        }
    }
}

template <int kDtype, bool kCapped>
float row_loss(void* logits, int64_t columns, int64_t label, float softcap, float* scratch) {
    auto* row = static_cast<char*>(logits);
    const SoftmaxSums sums = read_row<kDtype, kCapped>(row, columns, label, softcap, scratch);
    const double score = static_cast<double>(sums.chosen) - sums.largest, turn = kCapped ? sums.chosen / softcap : 0.0f;
    if (scratch) {
        write_row<kDtype, kCapped>(scratch, columns, sums, softcap, row);
        const double gradient = (::exp(score) / sums.total - 1.0) * (1.0 - turn * turn);
        store_element(row, kDtype, label, static_cast<float>(gradient));
    }
    return static_cast<float>(::log(sums.total) - score);
}

template <int kDtype>
float row_loss_of(void* logits, int64_t columns, int64_t label, float softcap, float* scratch) {
    const auto chosen = softcap > 0.0f ? row_loss<kDtype, true> : row_loss<kDtype, false>;
    return chosen(logits, columns, label, softcap, scratch);
}

float cross_entropy(void* logits, int64_t columns, int64_t label, float softcap, int dtype, float* scratch) {
    return ENTRENAR_FOR_DTYPE(dtype, row_loss_of, logits, columns, label, softcap, scratch);
}

}  // namespace
}  // namespace entrenar
