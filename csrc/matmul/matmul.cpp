// Which kernel serves, and the entry point for a sum of products.
#include "matmul/matmul.h"

#include "abi/abi.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "matmul/sum.h"

namespace entrenar {

const MatmulKernel& matmul_kernel() {
#if defined(__x86_64__)
    if (has_amx()) return matmul_amx;
    if (has_avx512_bf16()) return matmul_avx512bf16;
#endif
    static constexpr Paths<MatmulKernel> kPaths{&matmul_generic, ENTRENAR_ON_X86(&matmul_avx2), nullptr, nullptr};
    return pick(kPaths);
}

}  // namespace entrenar

namespace {

constexpr int64_t kMostTerms = 1 << 16;  // more is a mistake, and would not fit memory

}  // namespace

// out (rows, columns) of `out_dtype` (float32 or bfloat16) = alpha · Σ A·op(B) + bias; bias bfloat16 or null.
ENTRENAR_API int entrenar_multiply(const entrenar::TermView* terms, int64_t count, const void* bias, int64_t bias_bytes,
                                   void* out, int64_t out_bytes, int64_t rows, int64_t columns, float alpha,
                                   int out_dtype, int threads) {
    using namespace entrenar;
    if (out_dtype != kFloat32 && out_dtype != kBfloat16) return kBadDtype;
    int64_t elements = 0;
    if (count < 0 || count > kMostTerms || !multiply(rows, columns, &elements)) return kBadSize;
    if (terms == nullptr && count > 0) return kNullPointer;
    if (const int error = check_buffer(out, out_bytes, elements, dtype_bytes(out_dtype))) return error;
    if (bias != nullptr) {
        if (const int error = check_buffer(bias, bias_bytes, columns, 2)) return error;
    }
    std::vector<Weight> sources(static_cast<size_t>(count));
    Sum sum{rows,   columns, {}, {out, columns, out_dtype, false, rows, {}}, alpha, static_cast<const uint16_t*>(bias),
            nullptr};
    for (int64_t i = 0; i < count; ++i) {
        const TermView& view = terms[i];
        int64_t reach = 0;
        if (view.inner < 0 || view.a_stride < view.inner) return kBadSize;
        if (rows > 0 && view.inner > 0) {
            if (!multiply(rows - 1, view.a_stride, &reach)) return kBadSize;
            if (__builtin_add_overflow(reach, view.inner, &reach)) return kBadSize;
        }
        if (const int error = check_buffer(view.a, view.a_bytes, reach, 2)) return error;
        Weight& source = sources[static_cast<size_t>(i)];
        if (const int error = read_weight(view.source, &source)) return error;
        sum.terms.push_back(
            {static_cast<const uint16_t*>(view.a), view.a_stride, view.inner, view.transposed != 0, &source});
    }
    return multiply_sums(matmul_kernel(), {sum}, threads);
}
