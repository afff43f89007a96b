// Kernels of the merge methods over one piece of a tensor (src/entrenar/merging): one table a path.
//
// Written once as loops over blocks that the compiler turns into vectors (blocks.h, task_sum.h, ranks.h), compiled by
// merge_<path>.cpp. Nothing here is fused or reassociated: every path gives the same bits. What is summed over a whole
// piece is summed in float64, in lanes of a fixed number.
#pragma once

#include <cstdint>

namespace entrenar {

// A flat tensor; dtype as in common/floats.h. Without data it is all zeros.
struct Operand {
    const void* data;
    int64_t dtype;
};

// A counter-based generator: the number at an index depends on key and index alone.
struct RandomKey {
    uint32_t first, second;
};

// One model's part in a task-vector merge: δ = x − base where `mask` (null: everywhere) is not 0, else 0.
struct TaskModel {
    Operand x;
    const uint8_t* mask;
    double value, vote,
        divisor;  // factors of δ in the sum and in the vote; what it adds to the divisor where it is kept
};

struct TaskSum {
    Operand base;
    const TaskModel* models;
    int64_t count;  // of models
    double lambda;
    bool consensus, divide, zero_is_positive;
    void* out;
    int out_dtype;
};

// Magnitude bins: the upper 15 bits of |δ| as float32, and the lower 16 of those whose upper bits are given. Two tables
// of each, for even and odd elements, so that equal neighbours do not wait for each other.
constexpr int64_t kUpperBins = 1 << 15, kLowerBins = 1 << 16;

struct Merge {
    // Counts of |x − base|; prefix −1: upper bits, else lower bits of elements with these upper bits.
    void (*histogram)(const Operand& x, const Operand& base, int64_t count, int64_t prefix, int64_t* counts);
    // counts[0] += how many |δ| have more bits than `last`; those from `first` to `last` are written to `out` from
    // counts[1] on, as far as the room for `room` goes, and counts[1] grows by their number.
    void (*between)(const Operand& x, const Operand& base, int64_t count, int32_t first, int32_t last, int32_t* out,
                    int64_t room, int64_t* counts);
    // mask[i] = whether |δ| has more than `threshold`'s bits, or the same and is among the first `ties` of those; the
    // number of such is returned. With `outside` the mask is cleared where that holds and else left as it is.
    int64_t (*keep_top)(const Operand& x, const Operand& base, int64_t count, uint32_t threshold, int64_t ties,
                        bool outside, uint8_t* mask);
    // mask[i] = random(key, start + i) < limit.
    void (*keep_random)(RandomKey key, int64_t start, int64_t count, int64_t limit, uint8_t* mask);
    // Per row of `columns`: mask = random < low + (high − low) · rank / (columns − 1), rank by |δ|, then by index.
    bool (*keep_by_rank)(const Operand& x, const Operand& base, int64_t rows, int64_t columns, double low, double high,
                         RandomKey key, int64_t start, uint8_t* mask);
    // sums[0] += Σ |δ|, sums[1] += Σ |δ| where mask.
    void (*absolute_sums)(const Operand& x, const Operand& base, const uint8_t* mask, int64_t count, double* sums);
    // How many elements are infinite or NaN.
    int64_t (*non_finite)(const Operand& x, int64_t count);
    // out = Σ coefficients · x.
    void (*weighted_sum)(const Operand* x, const double* coefficients, int64_t inputs, int64_t count, void* out,
                         int out_dtype);
    bool (*task_sum)(const TaskSum& task, int64_t count);
    // gram (inputs, inputs) += δ · δᵀ, the lower triangle; δ = x where base has no data.
    bool (*gram)(const Operand* x, int64_t inputs, const Operand& base, int64_t count, double* gram);
};

extern const Merge merge_generic, merge_avx2, merge_avx512;

}  // namespace entrenar
