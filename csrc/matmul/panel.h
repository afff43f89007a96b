// Products of matrices that are bfloat16 already, packed whole by their user: what attention is made of.
#pragma once

#include "matmul/matmul.h"

namespace entrenar {

// Elements from one group of 32 columns to the next in a packed (inner, columns) matrix.
inline int64_t packed_group(int64_t inner) { return (inner + kStep - 1) / kStep * kStepElements; }

// Elements of a packed (inner, columns) matrix.
inline int64_t packed_elements(int64_t inner, int64_t columns) {
    return packed_group(inner) * ((columns + kGroup - 1) / kGroup);
}

// What a row of pack_rows may hold at most.
constexpr int64_t kMaxPlainWidth = 1024;

// rows (count, width), `stride` elements apart, → packed (count, width); zeros up to whole steps and groups.
void pack_rows(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count, int64_t width,
               uint16_t* to);

// The same matrix → its transpose packed, (width, count). width is a multiple of 32.
void pack_rows_transposed(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count,
                          int64_t width, uint16_t* to);

// rows (count, width) → plain (width, padded) rows of the transpose, padded ≥ count a multiple of 32, zeros behind
// count; `packed` is room for packed_elements(count, width).
void transpose_rows(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count, int64_t width,
                    int64_t padded, uint16_t* packed, uint16_t* to);

// c (rows, groups · 32), rows apart by `pitch` floats, = or += a (rows, steps · 32) · packed b.
struct PackedProduct {
    const MatmulKernel* kernel;
    const uint16_t* a;
    int64_t a_stride, rows;  // elements
    const uint16_t* b;
    int64_t group_elements, steps, groups;
};
void multiply_packed(const PackedProduct& product, float* c, int64_t pitch, bool add);

}  // namespace entrenar
