// Where the right-hand side of a product comes from: a weight that is decoded to bfloat16 a piece of a row at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "codebook4/dequantize.h"
#include "gguf/blocks.h"
#include "symmetric/symmetric.h"

namespace entrenar {

enum class SourceKind : int32_t { dense = 0, codebook4 = 1, stack = 2, gguf = 3, int8 = 4 };

// A caller's weight (rows, columns), as ops/multiply.py fills it in; a stack is made here alone. Pointers may be unaligned.
struct SourceView {
    int32_t kind;
    int32_t dtype;        // dense: of its elements, float32 or bfloat16; gguf: ggml's type id
    int64_t rows, columns;
    int64_t stride;       // dense: elements from row to row
    float scale;          // dense: every element is multiplied by it
    int32_t unused;
    int64_t block_size;   // codebook4, int8
    const void* data;     // dense: elements; codebook4: packed codes; int8: codes; gguf: blocks
    int64_t data_bytes;
    ScaleBuffers scales;   // codebook4, int8
    const void* codebook;  // codebook4
    int64_t codebook_bytes;
};

struct Source {
    SourceView view;
    CodebookWeight codebook;
    const DequantizeCodebook* decoder;
    std::vector<const Source*> parts;  // stack: one below the other, each from a whole strip of 16 rows on
    gguf::BlockType block;             // gguf
    Int8Weight int8;

    // Where rows [row, row + rows), columns [column, column + count) lie as bfloat16, `stride` elements apart; null
    // unless the weight is bfloat16 and has all of them.
    const uint16_t* plain(int64_t row, int64_t rows, int64_t column, int64_t count, int64_t* stride) const;

    // Elements [column, column + count) of `row` as bfloat16; zeros where the weight has none.
    void decode(int64_t row, int64_t column, int64_t count, uint16_t* out) const;
};

// The parts, which have one number of columns, as one weight.
Source stack_sources(std::vector<const Source*> parts);

// Fill `source` from a caller's view, or say what is wrong with it.
int read_source(const SourceView& view, Source* source);

}  // namespace entrenar
