// x·Wᵀ for up to 16 tokens: the weight's bytes are read once and decoded a tile at a time, or not at all, and the weight as
// a whole never exists. Each element is summed by one thread in a fixed order: the result does not depend on how many.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "matmul/source.h"

namespace entrenar {

// x (count, columns), rows `stride` elements apart.
struct FewTokens {
    const void* x;
    int64_t count, stride;
    int dtype;
    const float* arranged;  // what `arrange` made of it, or null
};

// Whether W needs no decoded tile where the tokens are arranged: blocks that tile a row, and tile a chunk or are tiled by it.
bool stays_packed(const Source& source, const FewTokens& tokens);

// x → `to` (count, arranged_columns(columns)): each token's chunks in float32, nibble by nibble. columns is whole dwords.
inline int64_t arranged_columns(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }
void arrange(const FewTokens& tokens, int64_t columns, float* to);

// W is rounded to the tokens' dtype unless it stays packed; if that is not bfloat16, W is of 4 bits.
class FewTokensProduct {
public:
    // Both outlive it.
    FewTokensProduct(const Source& source, const FewTokens& tokens);

    // sums[t · kTileRows + r] += row first + r of W times token t, for r < count ≤ kTileRows.
    void add(int64_t first, int64_t count, float* sums) const;

private:
    void add_packed(int64_t first, int64_t count, float* sums) const;

    const Source& source_;
    const FewTokens& tokens_;
    bool packed_;
    decltype(Linear::dot) dot_;
};

}  // namespace entrenar
