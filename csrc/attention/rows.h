// The row-wise parts of attention over float vectors, for CPUs without bfloat16 instructions: written once, compiled
// per path.
#pragma once

#include "attention/attention.h"
#include "common/exp.h"

namespace entrenar {
namespace {

inline Ints every_lane() { return Ints{} - 1; }

// Lanes whose column, counted from `column`, lies in [first, last).
inline Ints inside(int64_t column, int64_t first, int64_t last) {
    Ints lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const auto bound = [column](int64_t at) {
        return static_cast<int32_t>(larger<int64_t>(smaller<int64_t>(at - column, kLanes), 0));
    };
    return (lane >= bound(first)) & (lane < bound(last));
}

inline Floats keep(Ints lanes, Floats values) { return (Floats)((Ints)values & lanes); }

inline Floats load_bf16(const uint16_t* from) { return widen_bf16(reinterpret_cast<const char*>(from)); }
inline void store_bf16(uint16_t* to, Floats values) { narrow_bf16(values, reinterpret_cast<char*>(to)); }

// body(column, lanes that count) over [first, last) in whole vectors; the lanes are a constant but in the first and the
// last.
template <class Body>
inline void over_range(int64_t first, int64_t last, const Body& body) {
    if (first >= last) return;
    int64_t c = first / kLanes * kLanes;
    const int64_t whole = last / kLanes * kLanes;
    if (c < first || last - c < kLanes) {
        body(c, inside(c, first, last));
        c += kLanes;
    }
    for (; c < whole; c += kLanes) body(c, every_lane());
    if (c < last) body(c, inside(c, first, last));
}

// Zeros before and behind the vectors that over_range goes over.
inline void zero_outside(uint16_t* row, int64_t first, int64_t last, int64_t columns) {
    const int64_t begin = first / kLanes * kLanes, end = first < last ? (last + kLanes - 1) / kLanes * kLanes : begin;
    std::memset(row, 0, static_cast<size_t>(begin) * 2);
    std::memset(row + end, 0, static_cast<size_t>(columns - end) * 2);
}

void softmax(const float* scores, int64_t first, int64_t last, int64_t columns, float scale, RowState* state, float* o,
             int64_t width, uint16_t* p) {
    const Floats lowest = all(-__builtin_inff());
    Floats highest = lowest;
    over_range(first, last,
               [&](int64_t c, Ints lanes) { highest = larger(lanes ? load<Floats>(scores + c) : lowest, highest); });
    const float before = state->maximum, maximum = largest(highest) * scale, now = maximum > before ? maximum : before;
    Floats total{};
    over_range(first, last, [&](int64_t c, Ints lanes) {
        const Floats power = exp_below_overflow(fused(load<Floats>(scores + c), all(scale), all(-now)));
        total += keep(lanes, power);
        store_bf16(p + c, keep(lanes, power));
    });
    zero_outside(p, first, last, columns);
    if (now == before || before == -__builtin_inff()) {
        state->sum += sum(total);  // which is 0 before the first maximum
    } else {
        const float shrink = exp(all(before - now))[0];
        state->sum = state->sum * shrink + sum(total);
        for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<Floats>(o + d) * shrink);
    }
    state->maximum = now;
}

void finish(const float* o, float sum, int64_t width, uint16_t* out) {
    const float reciprocal = 1.0f / sum;
    for (int64_t d = 0; d < width; d += kLanes) store_bf16(out + d, load<Floats>(o + d) * reciprocal);
}

float dot(const uint16_t* a, const uint16_t* b, int64_t width) {
    Floats total{};
    for (int64_t d = 0; d < width; d += kLanes) total = fused(load_bf16(a + d), load_bf16(b + d), total);
    return sum(total);
}

void gradient(const float* scores, const float* dp, const float* lse, const float* delta, int64_t first, int64_t last,
              int64_t columns, float scale, uint16_t* p, uint16_t* ds) {
    over_range(first, last, [&](int64_t c, Ints lanes) {
        const Floats power = exp_below_overflow(fused(load<Floats>(scores + c), all(scale), -load<Floats>(lse + c)));
        const Floats off = fused(load<Floats>(dp + c), all(scale), -load<Floats>(delta + c));
        store_bf16(p + c, keep(lanes, power));
        store_bf16(ds + c, keep(lanes, power * off));
    });
    zero_outside(p, first, last, columns);
    zero_outside(ds, first, last, columns);
}

void store_transposed(const float* c, int64_t pitch, int64_t count, int64_t width, uint16_t* out, int64_t stride) {
    for (int64_t d = 0; d < width; d += kLanes) {
        for (int64_t row = 0; row < count; ++row) {
            Floats values;
            for (int i = 0; i < kLanes; ++i) values[i] = c[(d + i) * pitch + row];
            store_bf16(out + row * stride + d, values);
        }
    }
}

constexpr AttentionRows kAttentionRows = {softmax, finish, dot, gradient, store_transposed};

}  // namespace
}  // namespace entrenar
