// C (M, N) = Σ A_s (M, K_s) · B_s (K_s, N) in bfloat16 with float32 sums, where every B_s is a weight that is decoded
// while it is multiplied. A linear layer with its adapter is one such sum: x·Wᵀ + u·Bᵀ; the gradient for the input that
// several layers share is another: Σ g·W + v·A.
//
// The work is cut into panels of columns. A thread decodes a panel of every B_s into the layout below, where it stays
// in the second cache, and runs all rows of A past it, a block of C at a time (Goto and van de Geijn 2008, with the
// roles of A and B as here).
#pragma once

#include <cstdint>

#include "weights/weight.h"

namespace entrenar {

// A packed panel is groups of 32 columns, one after the other; a group is steps of 32 along the inner dimension; a step
// is two strips of 16 columns; a strip is 16 pairs: [pair][column][2], the layout of a dot product of pairs and of an
// AMX tile alike.
constexpr int64_t kStep = 32, kGroup = 32, kStrip = 16, kStepElements = kStep * kGroup;

// One stretch of the inner dimension: rows of A at `a`, `a_stride` bytes apart, and the packed group of columns at `b`.
struct Run {
    const char* a;
    int64_t a_stride;
    const uint16_t* b;
    int64_t steps;
};

// Where a block of C goes: out = alpha · c + bias + residual as bfloat16, rows `stride` elements apart; the residual
// lies as the output does, and it and the bias may be null.
struct Bf16Block {
    uint16_t* out;
    const uint16_t *bias, *residual;
    int64_t stride, rows, columns;
};

struct MatmulKernel {
    int64_t rows, groups;  // of a block of C at most
    // c (rows, strips · 16), rows apart by `pitch` floats, = or += the sum over the runs; the first group of columns
    // lies `offset` elements past every run's b, the second `group_elements` past the first.
    void (*block)(const Run* runs, int64_t count, int64_t rows, int64_t strips, int64_t offset, int64_t group_elements,
                  float* c, int64_t pitch, bool add);
    // Before a thread's first block and after its last.
    void (*begin)();
    void (*end)();
    // Sixteen rows of 32 elements, rows `stride` elements apart → a strip of a step: [pair][row][2].
    void (*pack_transposed)(const uint16_t* rows, int64_t stride, uint16_t* strip);
    // Two rows of `groups` · 32 elements → a pair of every strip; groups lie `group_elements` apart.
    void (*pack_pairs)(const uint16_t* first, const uint16_t* second, int64_t groups, int64_t group_elements,
                       uint16_t* pair);
    void (*store_bf16)(const Bf16Block& to, const float* c, int64_t pitch, float alpha);
};

extern const MatmulKernel matmul_generic, matmul_avx2, matmul_avx512bf16, matmul_amx;

// The kernel of the path in use.
const MatmulKernel& matmul_kernel();

// What the last two share, compiled for AVX512-BF16.
void pack_transposed_avx512bf16(const uint16_t* rows, int64_t stride, uint16_t* strip);
void pack_pairs_avx512bf16(const uint16_t* first, const uint16_t* second, int64_t groups, int64_t group_elements,
                           uint16_t* pair);
void store_bf16_avx512bf16(const Bf16Block& to, const float* c, int64_t pitch, float alpha);

}  // namespace entrenar
