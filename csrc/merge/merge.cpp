// The exported merge functions: check sizes, pick a table. One call works alone on its piece: callers are many threads.
#include "merge/merge.h"

#include "abi/abi.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

const Merge& merge() {
    static constexpr Paths<Merge> kPaths{&merge_generic, ENTRENAR_ON_X86(&merge_avx2), ENTRENAR_ON_X86(&merge_avx512),
                                         nullptr};
    return pick(kPaths);
}

int check(const Operand& operand, int64_t bytes, int64_t count) {
    if (operand.data == nullptr) return bytes == 0 ? kOk : kNullPointer;
    if (!is_dtype(static_cast<int>(operand.dtype))) return kBadDtype;
    return check_buffer(operand.data, bytes, count, dtype_bytes(static_cast<int>(operand.dtype)));
}

int check_two(const Operand& x, int64_t x_bytes, const Operand& base, int64_t base_bytes, int64_t count) {
    if (x.data == nullptr && count > 0) return kNullPointer;
    if (const int error = check(x, x_bytes, count)) return error;
    return check(base, base_bytes, count);
}

// Operands, one a row of five: address, bytes, dtype, address and bytes of the mask.
constexpr int64_t kRow = 5;

Operand operand_of(const int64_t* row) { return {reinterpret_cast<const void*>(row[0]), row[2]}; }

int check_rows(const int64_t* rows, int64_t rows_bytes, int64_t inputs, int64_t count) {
    if (const int error = check_buffer(rows, rows_bytes, inputs, kRow * 8)) return error;
    for (int64_t i = 0; i < inputs; ++i) {
        const int64_t* row = rows + i * kRow;
        if (row[0] == 0 && count > 0) return kNullPointer;
        if (const int error = check(operand_of(row), row[1], count)) return error;
        if (row[3] && row[4] < count) return kBufferTooSmall;
    }
    return kOk;
}

int check_out(const void* out, int64_t out_bytes, int out_dtype, int64_t count) {
    if (!is_dtype(out_dtype)) return kBadDtype;
    return check_buffer(out, out_bytes, count, dtype_bytes(out_dtype));
}

constexpr int64_t kMostInputs = 1024;

}  // namespace
}  // namespace entrenar

using namespace entrenar;

// counts: int64 (2, bins), added to; prefix −1: upper bins, else the lower bins of that upper bin.
ENTRENAR_API int entrenar_merge_histogram(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                          int64_t base_bytes, int base_dtype, int64_t count, int64_t prefix,
                                          void* counts, int64_t counts_bytes) {
    const Operand operand{x, x_dtype}, other{base, base_dtype};
    if (const int error = check_two(operand, x_bytes, other, base_bytes, count)) return error;
    if (prefix >= kUpperBins) return kBadArgument;
    const int64_t bins = prefix < 0 ? kUpperBins : kLowerBins;
    if (const int error = check_buffer(counts, counts_bytes, 2 * bins, 8)) return error;
    merge().histogram(operand, other, count, prefix < 0 ? -1 : prefix, static_cast<int64_t*>(counts));
    return kOk;
}

// out: int32; totals: int64 (2,), how many are above and how many between, added to; see merge.h.
ENTRENAR_API int entrenar_merge_between(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                        int64_t base_bytes, int base_dtype, int64_t count, int64_t first, int64_t last,
                                        void* out, int64_t out_bytes, void* totals, int64_t totals_bytes) {
    const Operand operand{x, x_dtype}, other{base, base_dtype};
    if (const int error = check_two(operand, x_bytes, other, base_bytes, count)) return error;
    if (const int error = check_buffer(out, out_bytes, 0, 4)) return error;
    if (const int error = check_buffer(totals, totals_bytes, 2, 8)) return error;
    auto* counts = static_cast<int64_t*>(totals);
    if (first < 0 || last > 0x7FFFFFFF || first > last || counts[1] < 0) return kBadArgument;
    merge().between(operand, other, count, static_cast<int32_t>(first), static_cast<int32_t>(last),
                    static_cast<int32_t*>(out), out_bytes / 4, counts);
    return kOk;
}

// ties: int64 (1,), the number left, lowered by those used.
ENTRENAR_API int entrenar_merge_keep_top(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                         int64_t base_bytes, int base_dtype, int64_t count, int64_t threshold,
                                         void* ties, int64_t ties_bytes, int outside, void* mask, int64_t mask_bytes) {
    const Operand operand{x, x_dtype}, other{base, base_dtype};
    if (const int error = check_two(operand, x_bytes, other, base_bytes, count)) return error;
    if (const int error = check_buffer(mask, mask_bytes, count, 1)) return error;
    if (const int error = check_buffer(ties, ties_bytes, 1, 8)) return error;
    if (threshold < 0 || threshold > 0x7FFFFFFF) return kBadArgument;
    auto* left = static_cast<int64_t*>(ties);
    *left -= merge().keep_top(operand, other, count, static_cast<uint32_t>(threshold), *left, outside != 0,
                              static_cast<uint8_t*>(mask));
    return kOk;
}

ENTRENAR_API int entrenar_merge_keep_random(int64_t first, int64_t second, int64_t start, int64_t count, int64_t limit,
                                            void* mask, int64_t mask_bytes) {
    if (start < 0) return kBadArgument;
    if (const int error = check_buffer(mask, mask_bytes, count, 1)) return error;
    const RandomKey key{static_cast<uint32_t>(first), static_cast<uint32_t>(second)};
    merge().keep_random(key, start, count, limit, static_cast<uint8_t*>(mask));
    return kOk;
}

// range: float64 (2,), the probabilities of the smallest and of the largest magnitude of a row.
ENTRENAR_API int entrenar_merge_keep_by_rank(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                             int64_t base_bytes, int base_dtype, int64_t rows, int64_t columns,
                                             const void* range, int64_t range_bytes, int64_t first, int64_t second,
                                             int64_t start, void* mask, int64_t mask_bytes) {
    const Operand operand{x, x_dtype}, other{base, base_dtype};
    int64_t count = 0;
    if (!multiply(rows, columns, &count) || columns > 0xFFFFFFFF) return kBadSize;
    if (const int error = check_two(operand, x_bytes, other, base_bytes, count)) return error;
    if (const int error = check_buffer(mask, mask_bytes, count, 1)) return error;
    if (const int error = check_buffer(range, range_bytes, 2, 8)) return error;
    if (start < 0) return kBadArgument;
    const auto* ends = static_cast<const double*>(range);
    const RandomKey key{static_cast<uint32_t>(first), static_cast<uint32_t>(second)};
    const bool done =
        merge().keep_by_rank(operand, other, rows, columns, ends[0], ends[1], key, start, static_cast<uint8_t*>(mask));
    return done ? kOk : kNoMemory;
}

// sums: float64 (2,), added to.
ENTRENAR_API int entrenar_merge_absolute_sums(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                              int64_t base_bytes, int base_dtype, const void* mask, int64_t mask_bytes,
                                              int64_t count, void* sums, int64_t sums_bytes) {
    const Operand operand{x, x_dtype}, other{base, base_dtype};
    if (const int error = check_two(operand, x_bytes, other, base_bytes, count)) return error;
    if (const int error = check_buffer(mask, mask_bytes, count, 1)) return error;
    if (const int error = check_buffer(sums, sums_bytes, 2, 8)) return error;
    merge().absolute_sums(operand, other, static_cast<const uint8_t*>(mask), count, static_cast<double*>(sums));
    return kOk;
}

// total: int64 (1,).
ENTRENAR_API int entrenar_merge_non_finite(const void* x, int64_t x_bytes, int x_dtype, int64_t count, void* total,
                                           int64_t total_bytes) {
    const Operand operand{x, x_dtype};
    if (const int error = check_two(operand, x_bytes, Operand{nullptr, 0}, 0, count)) return error;
    if (const int error = check_buffer(total, total_bytes, 1, 8)) return error;
    *static_cast<int64_t*>(total) = merge().non_finite(operand, count);
    return kOk;
}

// inputs: int64 (n, 5), see kRow; coefficients: float64 (n,).
ENTRENAR_API int entrenar_merge_weighted_sum(const void* inputs, int64_t inputs_bytes, const void* coefficients,
                                             int64_t coefficients_bytes, int64_t n, int64_t count, void* out,
                                             int64_t out_bytes, int out_dtype) {
    if (n < 0 || n > kMostInputs) return kBadArgument;
    const auto* rows = static_cast<const int64_t*>(inputs);
    if (const int error = check_rows(rows, inputs_bytes, n, count)) return error;
    if (const int error = check_buffer(coefficients, coefficients_bytes, n, 8)) return error;
    if (const int error = check_out(out, out_bytes, out_dtype, count)) return error;
    Operand operands[kMostInputs];
    for (int64_t i = 0; i < n; ++i) operands[i] = operand_of(rows + i * kRow);
    merge().weighted_sum(operands, static_cast<const double*>(coefficients), n, count, out, out_dtype);
    return kOk;
}

// inputs: int64 (n, 5), see kRow; factors: float64 (n, 3): value, vote, divisor. flags: 1 consensus, 2 divide by the
// kept divisors, 4 a vote of zero elects plus. lambda: float64 (1,).
ENTRENAR_API int entrenar_merge_task_sum(const void* base, int64_t base_bytes, int base_dtype, const void* inputs,
                                         int64_t inputs_bytes, const void* factors, int64_t factors_bytes, int64_t n,
                                         int64_t count, const void* lambda, int64_t lambda_bytes, int flags, void* out,
                                         int64_t out_bytes, int out_dtype) {
    if (n < 0 || n > kMostInputs) return kBadArgument;
    const Operand other{base, base_dtype};
    if (const int error = check(other, base_bytes, count)) return error;
    const auto* rows = static_cast<const int64_t*>(inputs);
    if (const int error = check_rows(rows, inputs_bytes, n, count)) return error;
    if (const int error = check_buffer(factors, factors_bytes, n, 24)) return error;
    if (const int error = check_buffer(lambda, lambda_bytes, 1, 8)) return error;
    if (const int error = check_out(out, out_bytes, out_dtype, count)) return error;
    TaskModel models[kMostInputs];
    const auto* factor = static_cast<const double*>(factors);
    for (int64_t i = 0; i < n; ++i, factor += 3) {
        const int64_t* row = rows + i * kRow;
        models[i] = {operand_of(row), reinterpret_cast<const uint8_t*>(row[3]), factor[0], factor[1], factor[2]};
    }
    const TaskSum task{
        other, models,   n, *static_cast<const double*>(lambda), (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0,
        out,   out_dtype};
    return merge().task_sum(task, count) ? kOk : kNoMemory;
}

// gram: float64 (n, n), its lower triangle is added to.
ENTRENAR_API int entrenar_merge_gram(const void* inputs, int64_t inputs_bytes, int64_t n, const void* base,
                                     int64_t base_bytes, int base_dtype, int64_t count, void* gram,
                                     int64_t gram_bytes) {
    if (n < 0 || n > kMostInputs) return kBadArgument;
    const Operand other{base, base_dtype};
    if (const int error = check(other, base_bytes, count)) return error;
    const auto* rows = static_cast<const int64_t*>(inputs);
    if (const int error = check_rows(rows, inputs_bytes, n, count)) return error;
    if (const int error = check_buffer(gram, gram_bytes, n * n, 8)) return error;
    Operand operands[kMostInputs];
    for (int64_t i = 0; i < n; ++i) operands[i] = operand_of(rows + i * kRow);
    return merge().gram(operands, n, other, count, static_cast<double*>(gram)) ? kOk : kNoMemory;
}
