// The right-hand side of a product: a weight that is decoded a piece of a row at a time, whatever it is held as.
//
// What a kind of weight can do is a row of a table (WeightKind): dense.cpp, codebook4.cpp, gguf.cpp and int8.cpp are a
// row each, and weight.cpp lists them. A new kind is one such file, its number in abi.h and a line in that list;
// nothing else asks a weight for its kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "abi/abi.h"

namespace entrenar {

struct Weight;

// x (count, columns) of few tokens, rows `stride` elements apart.
struct FewTokens {
    const void* x;
    int64_t count, stride;
    int dtype;
    const float* wide;    // x in float32, (count, columns), or null
    const float* chunks;  // as packed_dot of linear/linear.h takes it, or null
};

// How a weight's rows meet few tokens: decoded a tile at a time, or as they are held, x laid out in chunks or in
// float32.
enum class Meeting { decoded, chunks, wide };

struct WeightKind {
    SourceKind kind;

    // Error unless the view, of `count` elements, is in order; what decoding needs goes into the weight's state.
    int (*check)(const SourceView& view, int64_t count, Weight* weight);

    // Elements [column, column + count) of `row`, all of them there, as `dtype`: bfloat16, or any if `decodes_any`.
    void (*decode)(const Weight& weight, int64_t row, int64_t column, int64_t count, void* out, int dtype);
    bool decodes_any;

    // Where rows from `row` on lie as bfloat16, rows `stride` elements apart; null, or null returned, where they do
    // not.
    const uint16_t* (*plain)(const Weight& weight, int64_t row, int64_t column, int64_t* stride);

    // For at least one token and at most kMaxPackedTokens.
    Meeting (*meeting)(const Weight& weight);

    // sums[t · kTileRows + r] += row first + r of W times token t, for r < count ≤ kTileRows, x laid out as `meeting`
    // says; null where that is always `decoded`.
    void (*add)(const Weight& weight, const FewTokens& tokens, int64_t first, int64_t count, float* sums);
};

extern const WeightKind kDenseKind, kCodebook4Kind, kGgufKind, kInt8Kind;

struct Weight {
    SourceView view{};
    const WeightKind* kind = nullptr;  // null: a stack
    std::vector<const Weight*> parts;  // of a stack: one below the other, each from a whole strip of 16 rows on

    // What `check` worked out, for `decode` and `add`.
    template <class State>
    State& state() {
        static_assert(sizeof(State) <= sizeof state_ && std::is_trivially_copyable<State>::value, "it lies in bytes");
        return *reinterpret_cast<State*>(state_);
    }
    template <class State>
    const State& state() const {
        return const_cast<Weight*>(this)->state<State>();
    }

    // Where rows [row, row + rows), columns [column, column + count) lie as bfloat16, `stride` elements apart; null
    // unless the weight is bfloat16 and has all of them.
    const uint16_t* plain(int64_t row, int64_t rows, int64_t column, int64_t count, int64_t* stride) const;

    // Elements [column, column + count) of `row` as bfloat16; zeros where the weight has none.
    void decode(int64_t row, int64_t column, int64_t count, uint16_t* out) const;

    Meeting meeting(int64_t tokens) const;

private:
    alignas(16) std::byte state_[160] = {};
};

// The parts, which have one number of columns, as one weight.
Weight stack_weights(std::vector<const Weight*> parts);

// Fill `weight` from a caller's view, or say what is wrong with it.
int read_weight(const SourceView& view, Weight* weight);

}  // namespace entrenar
