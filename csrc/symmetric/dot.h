// Dot products of int8 codes with up to 4 tokens, over float vectors: each path's table has its instance.
#pragma once

#include "common/lanes.h"
#include "common/prefetch.h"
#include "common/tokens.h"
#include "symmetric/symmetric.h"

namespace entrenar {
namespace {

// sums[t] += scale · Σ codes[k] · x[t][k]; what is left of a block after whole vectors goes to rest[t].
template <int kTokens>
inline void add_block(const int8_t* codes, int64_t count, float scale, const float* x, int64_t x_stride, Floats* sums,
                      float* rest) {
    Floats partial[kTokens] = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Floats values = __builtin_convertvector(load_bytes(codes + k), Floats);
        for (int t = 0; t < kTokens; ++t) partial[t] = fused(values, load<Floats>(x + t * x_stride + k), partial[t]);
    }
    for (int t = 0; t < kTokens; ++t) sums[t] = fused(partial[t], all(scale), sums[t]);
    for (; k < count; ++k) {
        for (int t = 0; t < kTokens; ++t) rest[t] += scale * static_cast<float>(codes[k]) * x[t * x_stride + k];
    }
}

template <int kTokens>
void dot_tokens(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end,
                const float* x, int64_t x_stride, float* out) {
    Floats sums[kTokens] = {};
    float rest[kTokens] = {};
    for (int64_t left = block_size - begin % block_size; begin < end; left = block_size, ++scales) {
        const int64_t count = end - begin < left ? end - begin : left;
        for (int64_t i = 0; i < count; i += 64) fetch_ahead(codes + begin + i);
        add_block<kTokens>(codes + begin, count, *scales, x, x_stride, sums, rest);
        begin += count;
        x += count;
    }
    for (int t = 0; t < kTokens; ++t) out[t] += sum(sums[t]) + rest[t];
}

void dot_int8(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end, const float* x,
              int64_t x_stride, int64_t tokens, float* sums) {
    for_tokens(tokens,
               [&](auto count) { dot_tokens<count>(codes, scales, block_size, begin, end, x, x_stride, sums); });
}

}  // namespace
}  // namespace entrenar
