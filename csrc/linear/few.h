// x·Wᵀ for up to 16 tokens: the weight's bytes are read once, and decoded a tile at a time or on their way into the
// sum; the weight as a whole never exists. One thread sums an element in a fixed order: the result does not depend on
// how many.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "weights/weight.h"

namespace entrenar {

// x as the weights it meets want it, in the caller's scratch.
class Arranged {
public:
    // Take note of a weight that x will meet.
    void meet(const Weight& weight, const FewTokens& tokens);

    // Floats of scratch that the whole needs.
    int64_t floats(const FewTokens& tokens, int64_t columns) const;

    // Fill the scratch, and let the tokens point into it.
    void fill(FewTokens* tokens, int64_t columns, float* to) const;

private:
    bool wide_ = false, chunks_ = false;
};

// W is rounded to the tokens' dtype where it is decoded; if that is not bfloat16, W is of 4 bits.
class FewTokensProduct {
public:
    // Both outlive it.
    FewTokensProduct(const Weight& weight, const FewTokens& tokens);

    // sums[t · kTileRows + r] += row first + r of W times token t, for r < count ≤ kTileRows.
    void add(int64_t first, int64_t count, float* sums) const;

private:
    void add_decoded(int64_t first, int64_t count, float* sums) const;

    const Weight& weight_;
    const FewTokens& tokens_;
    bool decodes_;  // a tile at a time
};

}  // namespace entrenar
