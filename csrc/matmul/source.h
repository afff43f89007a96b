// Where the right-hand side of a product comes from: a weight that is decoded to bfloat16 a piece of a row at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "abi/abi.h"
#include "codebook4/dequantize.h"
#include "gguf/blocks.h"
#include "symmetric/symmetric.h"

namespace entrenar {

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
