// Weighted sums, task-vector sums with sign consensus, and Gram matrices, a block at a time.
//
// Results of 16 bits are summed in float32, those of 32 bits in float64, and rounded once.
#pragma once

#include "common/scratch.h"
#include "merge/blocks.h"

namespace entrenar {
namespace {

// Vectors of either float type: choices between them are masks, which the compiler does not make of plain loops here.
template <class Real>
struct Vector {
    typedef Real Type __attribute__((vector_size(kLanes * 4)));
    static constexpr int64_t kCount = kLanes * 4 / static_cast<int64_t>(sizeof(Real));
    static Type all(Real value) { return value - Type{}; }
};

template <class Real>
void weighted_sum(const Operand* x, const double* coefficients, int64_t inputs, int64_t count, void* out, int dtype) {
    for_blocks(count, [&](int64_t at, int64_t length) {
        Real sum[kBlock] = {};
        for (int64_t input = 0; input < inputs; ++input) {
            alignas(64) float values[kBlock];
            widen_block(x[input], at, length, values);
            const auto factor = static_cast<Real>(coefficients[input]);
            for (int64_t i = 0; i < kBlock; ++i) sum[i] += factor * static_cast<Real>(values[i]);
        }
        round_block(sum, length, out, dtype, at);
    });
}

void weighted_sum(const Operand* x, const double* coefficients, int64_t inputs, int64_t count, void* out, int dtype) {
    const auto chosen = dtype == kFloat32 ? weighted_sum<double> : weighted_sum<float>;
    chosen(x, coefficients, inputs, count, out, dtype);
}

// delta (kBlock): (x − base) · mask: with products instead of choices a NaN is never hidden.
template <class Real>
inline void masked_delta(const TaskModel& model, const Real* base, int64_t at, int64_t length, Real* delta) {
    alignas(64) float values[kBlock];
    widen_block(model.x, at, length, values);
    for (int64_t i = 0; i < kBlock; ++i) delta[i] = static_cast<Real>(values[i]) - base[i];
    if (model.mask == nullptr) return;
    const auto* mask = reinterpret_cast<const int8_t*>(model.mask) + at;
    alignas(64) int8_t rest[kBlock];
    if (length < kBlock) {
        std::memcpy(rest, mask, static_cast<size_t>(length));
        std::fill(rest + length, rest + kBlock, int8_t{0});
        mask = rest;
    }
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        store(values + i, __builtin_convertvector(load_bytes(mask + i), Floats));
    }
    for (int64_t i = 0; i < kBlock; ++i) delta[i] *= static_cast<Real>(values[i]);
}

// A model's factors in the type of the sums.
template <class Real>
struct Factors {
    Real value, vote, divisor;
};

// The elected sign of a vector of elements: +1, −1, or 0 where nobody is to be kept.
template <class Real>
ENTRENAR_INLINE inline typename Vector<Real>::Type elect(const TaskSum& task, const Factors<Real>* factors,
                                                         const Real* deltas) {
    using V = Vector<Real>;
    typedef typename V::Type Values;
    const Values plus = V::all(1), minus = V::all(-1), none = V::all(0), zero = task.zero_is_positive ? plus : none;
    Values votes = none;
    for (int64_t m = 0; m < task.count; ++m) votes += V::all(factors[m].vote) * load<Values>(deltas + m * kBlock);
    return votes > none ? plus : (votes < none ? minus : zero);
}

// What a vector of elements moves by: of every model's value · δ the sum, or with consensus of those whose vote has the
// elected sign, over the sum of their divisors where that is asked for.
template <class Real>
ENTRENAR_INLINE inline typename Vector<Real>::Type moved(const TaskSum& task, const Factors<Real>* factors,
                                                         const Real* deltas) {
    using V = Vector<Real>;
    typedef typename V::Type Values;
    const Values none = V::all(0), one = V::all(1), sign = task.consensus ? elect(task, factors, deltas) : none;
    Values sum = none, divisor = none;
    for (int64_t m = 0; m < task.count; ++m) {
        const Values delta = load<Values>(deltas + m * kBlock), value = V::all(factors[m].value);
        if (!task.consensus) {
            sum += value * delta;
            continue;
        }
        const Values agrees = V::all(factors[m].vote) * delta * sign > none ? one : none;
        sum += value * delta * agrees;
        divisor += V::all(factors[m].divisor) * agrees;
    }
    return task.divide ? sum / (divisor == none ? one : divisor) : sum;
}

template <class Real>
bool task_sum(const TaskSum& task, int64_t count) {
    typedef typename Vector<Real>::Type Values;
    const int64_t delta_bytes = task.count * kBlock * static_cast<int64_t>(sizeof(Real));
    char* const scratch = thread_scratch(delta_bytes + task.count * static_cast<int64_t>(sizeof(Factors<Real>)));
    if (scratch == nullptr) return false;
    auto* const deltas = reinterpret_cast<Real*>(scratch);
    auto* const factors = reinterpret_cast<Factors<Real>*>(scratch + delta_bytes);
    for (int64_t m = 0; m < task.count; ++m) {
        const TaskModel& model = task.models[m];
        factors[m] = {static_cast<Real>(model.value), static_cast<Real>(model.vote), static_cast<Real>(model.divisor)};
    }
    const Values lambda = Vector<Real>::all(static_cast<Real>(task.lambda));
    for_blocks(count, [&](int64_t at, int64_t length) {
        alignas(64) float narrow[kBlock];
        alignas(64) Real base[kBlock], result[kBlock];
        widen_block(task.base, at, length, narrow);
        for (int64_t i = 0; i < kBlock; ++i) base[i] = static_cast<Real>(narrow[i]);
        for (int64_t m = 0; m < task.count; ++m) {
            masked_delta(task.models[m], base, at, length, deltas + m * kBlock);
        }
        for (int64_t i = 0; i < kBlock; i += Vector<Real>::kCount) {
            store<Values>(result + i, load<Values>(base + i) + lambda * moved(task, factors, deltas + i));
        }
        round_block(result, length, task.out, task.out_dtype, at);
    });
    return true;
}

bool task_sum(const TaskSum& task, int64_t count) {
    return task.out_dtype == kFloat32 ? task_sum<double>(task, count) : task_sum<float>(task, count);
}

inline void add_products(const double* a, const double* b, Sums* sums) {
    Sums here = *sums;
    for (int64_t i = 0; i < kBlock; i += kSums) {
        for (int j = 0; j < kSums; ++j) here.lane[j] += a[i + j] * b[i + j];
    }
    *sums = here;
}

bool gram(const Operand* x, int64_t inputs, const Operand& base, int64_t count, double* gram) {
    const int64_t pairs = inputs * (inputs + 1) / 2;
    const int64_t block_bytes = inputs * kBlock * 8, sum_bytes = pairs * static_cast<int64_t>(sizeof(Sums));
    char* scratch = thread_scratch(block_bytes + sum_bytes);
    if (scratch == nullptr) return false;
    auto* blocks = reinterpret_cast<double*>(scratch);
    auto* sums = reinterpret_cast<Sums*>(scratch + block_bytes);
    std::fill(sums, sums + pairs, Sums{});
    for_blocks(count, [&](int64_t at, int64_t length) {
        for (int64_t input = 0; input < inputs; ++input) {
            float delta[kBlock], other[kBlock];
            widen_block(x[input], at, length, delta);
            widen_block(base, at, length, other);
            double* const block = blocks + input * kBlock;
            for (int64_t i = 0; i < kBlock; ++i)
                block[i] = static_cast<double>(delta[i]) - static_cast<double>(other[i]);
        }
        Sums* pair = sums;
        for (int64_t row = 0; row < inputs; ++row) {
            for (int64_t column = 0; column <= row; ++column, ++pair) {
                add_products(blocks + row * kBlock, blocks + column * kBlock, pair);
            }
        }
    });
    const Sums* pair = sums;
    for (int64_t row = 0; row < inputs; ++row) {
        for (int64_t column = 0; column <= row; ++column, ++pair) gram[row * inputs + column] += pair->total();
    }
    return true;
}

}  // namespace
}  // namespace entrenar
