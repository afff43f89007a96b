// The inner loops of a linear layer for few tokens, on tiles of already decoded weights that stay in the first cache.
#pragma once

#include <cstdint>

namespace entrenar {

constexpr int64_t kMaxTokens = 16;
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = 2048;      // forward: 4 rows of 2048 bfloat16 are 16 KiB
constexpr int64_t kBackwardColumns = 512;   // backward: 16 tokens of 512 float32 are 32 KiB

struct Linear {
    // sums[t * kTileRows + r] += Σ_k x[t * x_stride + k] · rows[r * kTileColumns + k] for kTileRows rows, float32 sums.
    void (*dot)(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype,
                float* sums);
    // sums[t * kBackwardColumns + k] += Σ_r factors[t * kTileRows + r] · rows[r * kBackwardColumns + k].
    void (*accumulate)(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums);
};

extern const Linear linear_generic, linear_avx2, linear_avx512;

// The dot product of bfloat16 rows and x with AVX512-BF16, in place of linear_avx512's.
void dot_bf16_avx512bf16(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype,
                         float* sums);

}  // namespace entrenar
