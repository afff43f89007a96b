// A linear layer for up to 16 tokens: the weight's bytes are read once and decoded a tile at a time, and the weight as
// a whole never exists. Each output element is summed by one thread in a fixed order, so the result does not depend on
// the number of threads.
#include "linear/linear.h"

#include <algorithm>
#include <cstring>
#include "abi/abi.h"

#include "codebook4/dequantize.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "linear/few.h"
#include "weights/weight.h"

namespace entrenar {
namespace {

const Paths<Linear> kPaths = {&linear_generic, ENTRENAR_ON_X86(&linear_avx2), ENTRENAR_ON_X86(&linear_avx512), nullptr};

struct Shape {
    int64_t tokens, rows, columns;
};

int read_codebook(const SourceView& view, Weight* source) {
    return view.kind == static_cast<int32_t>(kCodebook4Kind.kind) ? read_weight(view, source) : kBadArgument;
}

int check_shape(const Shape& shape, int dtype, const void* in, int64_t in_bytes, int64_t in_columns, const void* out,
                int64_t out_bytes, int64_t out_columns) {
    if (!is_dtype(dtype)) return kBadDtype;
    int64_t elements = 0;
    if (!multiply(shape.rows, shape.columns, &elements)) return kBadSize;
    if (shape.tokens < 0 || shape.tokens > kMaxTokens) return kBadArgument;
    if (!multiply(shape.tokens, in_columns, &elements)) return kBadSize;
    if (const int error = check_buffer(in, in_bytes, elements, dtype_bytes(dtype))) return error;
    if (!multiply(shape.tokens, out_columns, &elements)) return kBadSize;
    return check_buffer(out, out_bytes, elements, dtype_bytes(dtype));
}

// y[:, first … first + count) of the forward.
void forward_rows(const FewTokensProduct& product, const Shape& shape, int64_t first, int64_t count, const void* bias,
                  void* y, int dtype) {
    float sums[kMaxTokens * kTileRows] = {};
    product.add(first, count, sums);
    for (int64_t r = 0; r < count; ++r) {
        const float added = bias ? load_element(bias, dtype, first + r) : 0.0f;
        for (int64_t t = 0; t < shape.tokens; ++t) {
            store_element(y, dtype, t * shape.rows + first + r, sums[t * kTileRows + r] + added);
        }
    }
}

// dx[:, begin … begin + columns) of the backward.
void backward_columns(const CodebookWeight& weight, const DequantizeCodebook& decoder, const Linear& kernel,
                      const Shape& shape, int64_t first, int64_t columns, const void* gradient, void* dx, int dtype) {
    alignas(64) float tile[kTileRows * kBackwardColumns];
    alignas(64) float sums[kMaxTokens * kBackwardColumns] = {};
    const int64_t bytes = dtype_bytes(dtype);
    for (int64_t row = 0; row < shape.rows; row += kTileRows) {
        float factors[kMaxTokens * kTileRows] = {};
        const int64_t rows = std::min(kTileRows, shape.rows - row);
        if (rows < kTileRows) std::memset(tile, 0, sizeof tile);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t begin = (row + r) * shape.columns + first;
            char* to = reinterpret_cast<char*>(tile) + r * kBackwardColumns * bytes;
            decode(decoder, weight, begin, begin + columns, to, dtype, false);
            for (int64_t t = 0; t < shape.tokens; ++t) {
                factors[t * kTileRows + r] = load_element(gradient, dtype, t * shape.rows + row + r);
            }
        }
        kernel.accumulate(tile, factors, shape.tokens, columns, dtype, sums);
    }
    for (int64_t t = 0; t < shape.tokens; ++t) {
        for (int64_t k = 0; k < columns; ++k) {
            store_element(dx, dtype, t * shape.columns + first + k, sums[t * kBackwardColumns + k]);
        }
    }
}

}  // namespace

const Linear& linear_kernel() { return pick(kPaths); }

}  // namespace entrenar

// y (tokens, rows) = x (tokens, columns) · Wᵀ + bias; W (rows, columns) of 4 bits. x, bias and y have one dtype; bias
// may be null. At most 16 tokens.
ENTRENAR_API int entrenar_linear_codebook(const entrenar::SourceView* view, const void* x, int64_t x_bytes,
                                          const void* bias, int64_t bias_bytes, void* y, int64_t y_bytes,
                                          int64_t tokens, int dtype, int threads) {
    using namespace entrenar;
    const Shape shape{tokens, view->rows, view->columns};
    if (const int error = check_shape(shape, dtype, x, x_bytes, shape.columns, y, y_bytes, shape.rows)) return error;
    if (bias != nullptr) {
        if (const int error = check_buffer(bias, bias_bytes, shape.rows, dtype_bytes(dtype))) return error;
    }
    Weight source;
    if (const int error = read_codebook(*view, &source)) return error;
    FewTokens few{x, tokens, shape.columns, dtype, nullptr, nullptr};
    Arranged arranged;
    arranged.meet(source, few);
    char* scratch = thread_scratch(arranged.floats(few, shape.columns) * 4 + 1, Scratch::call);
    if (scratch == nullptr) return kNoMemory;
    arranged.fill(&few, shape.columns, reinterpret_cast<float*>(scratch));
    const FewTokensProduct product(source, few);
    parallel_for(shape.rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kTileRows) {
            forward_rows(product, shape, row, std::min(kTileRows, end - row), bias, y, dtype);
        }
    });
    return kOk;
}

// dx (tokens, columns) = gradient (tokens, rows) · W. At most 16 tokens.
ENTRENAR_API int entrenar_linear_codebook_backward(const entrenar::SourceView* view, const void* gradient,
                                                   int64_t gradient_bytes, void* dx, int64_t dx_bytes, int64_t tokens,
                                                   int dtype, int threads) {
    using namespace entrenar;
    const Shape shape{tokens, view->rows, view->columns};
    if (const int error =
            check_shape(shape, dtype, gradient, gradient_bytes, shape.rows, dx, dx_bytes, shape.columns)) {
        return error;
    }
    Weight source;
    if (const int error = read_codebook(*view, &source)) return error;
    const CodebookWeight& weight = source.state<CodebookWeight>();
    const DequantizeCodebook& decoder = dequantize_codebook_kernel();
    const Linear& kernel = linear_kernel();
    parallel_for(shape.columns, kBackwardColumns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k += kBackwardColumns) {
            const int64_t width = std::min(kBackwardColumns, end - k);
            backward_columns(weight, decoder, kernel, shape, k, width, gradient, dx, dtype);
        }
    });
    return kOk;
}
