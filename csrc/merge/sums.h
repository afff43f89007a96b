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

// body(i) for the start of every vector of a block; what lies behind a block's end is computed and not used.
template <class Real, class Body>
ENTRENAR_INLINE inline void for_vectors(const Body& body) {
    for (int64_t i = 0; i < kBlock; i += Vector<Real>::kCount) body(i);
}

template <class Real>
void weighted_sum(const Operand* x, const double* coefficients, int64_t inputs, int64_t count, void* out, int dtype) {
    for_blocks(count, [&](int64_t at, int64_t length) {
        Real sum[kBlock] = {};
        for (int64_t input = 0; input < inputs; ++input) {
            float values[kBlock] = {};
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
    float values[kBlock] = {};
    widen_block(model.x, at, length, values);
    for (int64_t i = 0; i < kBlock; ++i) delta[i] = static_cast<Real>(values[i]) - base[i];
    if (model.mask == nullptr) return;
    float factors[kBlock] = {};
    const uint8_t* mask = model.mask + at;
    for (int64_t i = 0; i < length; ++i) factors[i] = static_cast<float>(mask[i]);
    for (int64_t i = 0; i < kBlock; ++i) delta[i] *= static_cast<Real>(factors[i]);
}

// The elected sign of each element: +1, −1, or 0 where nobody is to be kept.
template <class Real>
inline void elect(const TaskSum& task, const Real* deltas, Real* sign) {
    using V = Vector<Real>;
    typedef typename V::Type Values;
    const Values plus = V::all(1), minus = V::all(-1), none = V::all(0), zero = task.zero_is_positive ? plus : none;
    for_vectors<Real>([&](int64_t i) ENTRENAR_INLINE {
        Values votes = none;
        for (int64_t m = 0; m < task.count; ++m) {
            votes += V::all(static_cast<Real>(task.models[m].vote)) * load<Values>(deltas + m * kBlock + i);
        }
        store<Values>(sign + i, votes > none ? plus : (votes < none ? minus : zero));
    });
}

// sum and divisor (kBlock) += what this model adds where its vote has the elected sign.
template <class Real>
inline void add_kept(const TaskModel& model, const Real* delta, const Real* sign, Real* sum, Real* divisor) {
    using V = Vector<Real>;
    typedef typename V::Type Values;
    const Values value = V::all(static_cast<Real>(model.value)), weight = V::all(static_cast<Real>(model.divisor));
    const Values vote = V::all(static_cast<Real>(model.vote)), none = V::all(0), one = V::all(1);
    for_vectors<Real>([&](int64_t i) ENTRENAR_INLINE {
        const Values change = load<Values>(delta + i);
        const Values kept = vote * change * load<Values>(sign + i) > none ? one : none;
        store<Values>(sum + i, load<Values>(sum + i) + value * change * kept);
        store<Values>(divisor + i, load<Values>(divisor + i) + weight * kept);
    });
}

template <class Real>
inline void divide(const Real* divisor, Real* sum) {
    typedef typename Vector<Real>::Type Values;
    const Values none = Vector<Real>::all(0), one = Vector<Real>::all(1);
    for_vectors<Real>([&](int64_t i) ENTRENAR_INLINE {
        const Values by = load<Values>(divisor + i);
        store<Values>(sum + i, load<Values>(sum + i) / (by == none ? one : by));
    });
}

template <class Real>
bool task_sum(const TaskSum& task, int64_t count) {
    auto* deltas = reinterpret_cast<Real*>(thread_scratch(task.count * kBlock * static_cast<int64_t>(sizeof(Real))));
    if (deltas == nullptr) return false;
    const auto lambda = static_cast<Real>(task.lambda);
    for_blocks(count, [&](int64_t at, int64_t length) {
        float narrow[kBlock] = {};
        Real base[kBlock], sign[kBlock], sum[kBlock] = {}, divisor[kBlock] = {};
        widen_block(task.base, at, length, narrow);
        for (int64_t i = 0; i < kBlock; ++i) base[i] = static_cast<Real>(narrow[i]);
        for (int64_t m = 0; m < task.count; ++m) {
            masked_delta(task.models[m], base, at, length, deltas + m * kBlock);
        }
        if (task.consensus) elect(task, deltas, sign);
        for (int64_t m = 0; m < task.count; ++m) {
            const Real* delta = deltas + m * kBlock;
            if (task.consensus) {
                add_kept(task.models[m], delta, sign, sum, divisor);
                continue;
            }
            const auto value = static_cast<Real>(task.models[m].value);
            for (int64_t i = 0; i < kBlock; ++i) sum[i] += value * delta[i];
        }
        if (task.divide) divide(divisor, sum);
        for (int64_t i = 0; i < kBlock; ++i) sum[i] = base[i] + lambda * sum[i];
        round_block(sum, length, task.out, task.out_dtype, at);
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
            float delta[kBlock] = {}, other[kBlock] = {};
            widen_block(x[input], at, length, delta);
            if (base.data != nullptr) widen_block(base, at, length, other);
            double* const block = blocks + input * kBlock;
            for (int64_t i = 0; i < kBlock; ++i) block[i] = static_cast<double>(delta[i]) - static_cast<double>(other[i]);
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
