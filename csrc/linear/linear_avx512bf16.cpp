// Few-token dot products of bfloat16 with AVX512-BF16: 32 products an instruction, summed in float32.
#include <immintrin.h>

#include "linear/linear.h"

namespace entrenar {
namespace {

inline __m512bh load32(const uint16_t* from, __mmask32 mask) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, from));
}

// kTokens tokens against kTileRows rows: every loaded weight serves all of them.
template <int kTokens>
void dot_tokens(const uint16_t* rows, const uint16_t* x, int64_t x_stride, int64_t columns, float* out) {
    __m512 sums[kTokens][kTileRows] = {};
    for (int64_t k = 0; k < columns; k += 32) {
        const __mmask32 mask = columns - k < 32 ? (1u << (columns - k)) - 1 : 0xFFFFFFFFu;
        __m512bh weights[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) weights[r] = load32(rows + r * kTileColumns + k, mask);
        for (int t = 0; t < kTokens; ++t) {
            const __m512bh token = load32(x + t * x_stride + k, mask);
            for (int64_t r = 0; r < kTileRows; ++r) sums[t][r] = _mm512_dpbf16_ps(sums[t][r], token, weights[r]);
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int64_t r = 0; r < kTileRows; ++r) out[t * kTileRows + r] += _mm512_reduce_add_ps(sums[t][r]);
    }
}

}  // namespace

void dot_bf16_avx512bf16(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int,
                         float* sums) {
    const auto* weights = static_cast<const uint16_t*>(rows);
    const auto* from = static_cast<const uint16_t*>(x);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        dot_tokens<4>(weights, from + t * x_stride, x_stride, columns, sums + t * kTileRows);
    for (; t < tokens; ++t) dot_tokens<1>(weights, from + t * x_stride, x_stride, columns, sums + t * kTileRows);
}

}  // namespace entrenar
