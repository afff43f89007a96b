// A linear layer for up to 16 tokens: the weight's bytes are read once and decoded a tile at a time, and the weight as a
// whole never exists. Each output element is summed by one thread in a fixed order, so the
// result does not depend on the number of threads.
#include "linear/linear.h"

#include <algorithm>
#include <cstring>

#include "codebook4/dequantize.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "matmul/source.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainRows = 16;

const Paths<Linear> kPaths = {&linear_generic, ENTRENAR_ON_X86(&linear_avx2), ENTRENAR_ON_X86(&linear_avx512), nullptr};

decltype(Linear::dot) pick_dot(int dtype) {
#if defined(__x86_64__)
    if (dtype == kBfloat16 && has_avx512_bf16()) return dot_bf16_avx512bf16;
#endif
    (void)dtype;
    return pick(kPaths).dot;
}

struct Shape {
    int64_t tokens, rows, columns;
};

bool is_codebook(const SourceView& view) { return view.kind == static_cast<int32_t>(SourceKind::codebook4); }

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

// Columns [column, column + count) of a row of any weight as bfloat16, of a 4-bit one as any dtype.
void decode_row(const Source& source, int64_t row, int64_t column, int64_t count, char* to, int dtype) {
    if (!is_codebook(source.view)) return source.decode(row, column, count, reinterpret_cast<uint16_t*>(to));
    const int64_t begin = row * source.view.columns + column;
    decode(*source.decoder, source.codebook, begin, begin + count, to, dtype, false);
}

// y[:, first … first + kTileRows) of the forward.
void forward_rows(const Source& source, decltype(Linear::dot) dot, const Shape& shape, int64_t first, const void* x,
                  const void* bias, void* y, int dtype) {
    alignas(64) float tile[kTileRows * kTileColumns];  // room for float32; a 16-bit tile uses half
    const int64_t bytes = dtype_bytes(dtype), rows = std::min(kTileRows, shape.rows - first);
    float sums[kMaxTokens * kTileRows] = {};
    if (rows < kTileRows) std::memset(tile, 0, sizeof tile);
    for (int64_t k = 0; k < shape.columns; k += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, shape.columns - k);
        for (int64_t r = 0; r < rows; ++r) {
            char* row = reinterpret_cast<char*>(tile) + r * kTileColumns * bytes;
            decode_row(source, first + r, k, columns, row, dtype);
        }
        dot(tile, static_cast<const char*>(x) + k * bytes, shape.columns, shape.tokens, columns, dtype, sums);
    }
    for (int64_t t = 0; t < shape.tokens; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
            const float added = bias ? load_element(bias, dtype, first + r) : 0.0f;
            store_element(y, dtype, t * shape.rows + first + r, sums[t * kTileRows + r] + added);
        }
    }
}

// Whether packed_dot serves: whole chunks, and blocks that tile a chunk or are tiled by it.
bool can_stay_packed(const Linear& kernel, const CodebookWeight& weight, const Shape& shape) {
    const int64_t size = weight.block_size;
    return kernel.packed_dot != nullptr && shape.tokens >= 1 && shape.tokens <= kMaxPackedTokens &&
           shape.columns % kChunk == 0 && size >= 16 && (size & (size - 1)) == 0 &&
           (size <= kChunk || shape.columns % size == 0);
}

// x (tokens, columns) → each token's chunks in float32, nibble by nibble.
void arrange(const Shape& shape, const void* x, int dtype, float* to) {
    for (int64_t from = 0; from < shape.tokens * shape.columns; from += kChunk) {
        for (int64_t nibble = 0; nibble < 8; ++nibble) {
            for (int64_t lane = 0; lane < 16; ++lane) *to++ = load_element(x, dtype, from + chunk_element(nibble, lane));
        }
    }
}

// y[:, begin … end) of the forward, straight from the packed rows.
void forward_packed(const CodebookWeight& weight, const Linear& kernel, const Shape& shape, int64_t begin, int64_t end,
                    const float* arranged, const void* bias, void* y, int dtype) {
    const int64_t blocks = shape.columns / weight.block_size;  // of a row
    float scales[kScaleGroup], sums[kMaxPackedTokens];
    for (int64_t row = begin; row < end; ++row) {
        float totals[kMaxPackedTokens] = {};
        for (int64_t block = 0; block < blocks; block += kScaleGroup) {
            const int64_t count = std::min(kScaleGroup, blocks - block), first = row * shape.columns + block * weight.block_size;
            decode_scales(weight.scales, row * blocks + block, count, scales);
            kernel.packed_dot(weight.packed + first / 2, scales, weight.codebook, weight.block_size,
                              arranged + block * weight.block_size, shape.columns, shape.tokens, count * weight.block_size / kChunk, sums);
            for (int64_t t = 0; t < shape.tokens; ++t) totals[t] += sums[t];
        }
        const float added = bias ? load_element(bias, dtype, row) : 0.0f;
        for (int64_t t = 0; t < shape.tokens; ++t) store_element(y, dtype, t * shape.rows + row, totals[t] + added);
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
}  // namespace entrenar

// y (tokens, rows) = x (tokens, columns) · Wᵀ + bias; W (rows, columns) rounded to `dtype`, which x, bias and y also
// have: bfloat16, or with 4 bits any. bias may be null. At most 16 tokens.
ENTRENAR_API int entrenar_linear(const entrenar::SourceView* view, const void* x, int64_t x_bytes, const void* bias,
                                 int64_t bias_bytes, void* y, int64_t y_bytes, int64_t tokens, int dtype, int threads) {
    using namespace entrenar;
    const Shape shape{tokens, view->rows, view->columns};
    if (const int error = check_shape(shape, dtype, x, x_bytes, shape.columns, y, y_bytes, shape.rows)) return error;
    if (bias != nullptr) {
        if (const int error = check_buffer(bias, bias_bytes, shape.rows, dtype_bytes(dtype))) return error;
    }
    if (!is_codebook(*view) && dtype != kBfloat16) return kBadDtype;
    Source source;
    if (const int error = read_source(*view, &source)) return error;
    const CodebookWeight& weight = source.codebook;
    const Linear& kernel = pick(kPaths);
    if (is_codebook(*view) && can_stay_packed(kernel, weight, shape)) {
        char* scratch = thread_scratch(tokens * shape.columns * 4);
        if (scratch == nullptr) return kNoMemory;
        auto* arranged = reinterpret_cast<float*>(scratch);
        arrange(shape, x, dtype, arranged);
        parallel_for(shape.rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
            forward_packed(weight, kernel, shape, begin, end, arranged, bias, y, dtype);
        });
        return kOk;
    }
    const auto dot = pick_dot(dtype);
    parallel_for(shape.rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kTileRows) {
            forward_rows(source, dot, shape, row, x, bias, y, dtype);
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
    if (const int error = check_shape(shape, dtype, gradient, gradient_bytes, shape.rows, dx, dx_bytes, shape.columns)) {
        return error;
    }
    if (!is_codebook(*view)) return kBadArgument;
    Source source;
    if (const int error = read_source(*view, &source)) return error;
    const CodebookWeight& weight = source.codebook;
    const DequantizeCodebook& decoder = dequantize_codebook_kernel();
    const Linear& kernel = pick(kPaths);
    parallel_for(shape.columns, kBackwardColumns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k += kBackwardColumns) {
            const int64_t width = std::min(kBackwardColumns, end - k);
            backward_columns(weight, decoder, kernel, shape, k, width, gradient, dx, dtype);
        }
    });
    return kOk;
}
