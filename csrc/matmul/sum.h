// A sum of products over decoded weights, as C++ users of matmul.h write it; sum.cpp cuts it up and runs it.
#pragma once

#include <vector>

#include "matmul/matmul.h"

namespace entrenar {

// One product of the sum: A (rows, inner) bfloat16 times op(B) (inner, columns), which is B itself or, `transposed`,
// the (columns, inner) matrix it is the transpose of. A weight smaller than that counts as followed by zeros.
struct Term {
    const uint16_t* a;
    int64_t a_stride;  // elements
    int64_t inner;
    bool transposed;
    const Weight* source;
};

// Where C goes: row r, column c to data[r · stride + c], or transposed to data[c · stride + r]. Rows from `row_limit`
// on are computed but dropped. Where `rows` is not empty row r goes to rows[r] instead, or nowhere if that is null.
struct Output {
    void* data;
    int64_t stride;   // elements
    int dtype;        // float32 or bfloat16
    bool transposed;  // float32 only
    int64_t row_limit;
    std::vector<float*> rows;  // float32 only
};

struct Sum {
    int64_t rows, columns;
    std::vector<Term> terms;
    Output out;
    float alpha;
    const uint16_t* bias;      // (columns,) or null; not for a transposed output
    const uint16_t* residual;  // laid out as the bfloat16 output it is added to, or null
};

// For each: out = alpha · Σ A·op(B) + bias + residual. None may read what another writes: threads take from all of
// them.
int multiply_sums(const MatmulKernel& kernel, const std::vector<Sum>& sums, int threads);

// A stretch of a term's inner dimension, a whole number of steps but for the term's end.
struct Piece {
    const Term* term;
    int64_t begin, end;
    int64_t steps() const { return (end - begin + kStep - 1) / kStep; }
};

// Columns [column, column + groups · 32) of a piece of B into the layout of matmul.h.
void pack_piece(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups, int64_t group_elements,
                uint16_t* to);

}  // namespace entrenar
