// The inner loops of a linear layer for few tokens, on tiles of already decoded weights that stay in the first cache.
#pragma once

#include <cstdint>

namespace entrenar {

constexpr int64_t kMaxTokens = 16;
constexpr int64_t kTileRows = 4;
constexpr int64_t kGrainRows = 16;         // of a weight that a thread takes at least
constexpr int64_t kTileColumns = 2048;     // forward: 4 rows of 2048 bfloat16 are 16 KiB
constexpr int64_t kBackwardColumns = 512;  // backward: 16 tokens of 512 float32 are 32 KiB

// Few tokens of a layer whose rows are whole dwords of 8 codes need no decoded tile: x is laid out once in the order in
// which the nibbles of a chunk come out of its 16 dwords, the last chunk filled up with zeros, and every code looks its
// value up on the way into the sum. The weight is then not rounded to x's dtype.
constexpr int64_t kChunk = 128, kDword = 8, kMaxPackedTokens = 4;

// Columns with the last chunk filled up.
constexpr int64_t whole_chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

// Element of the chunk that nibble `nibble` (from the lowest) of dword `lane` holds.
constexpr int64_t chunk_element(int64_t nibble, int64_t lane) { return 8 * lane + (nibble ^ 1); }

// Rows of whole dwords of codes with their blocks' scales, and the tokens they meet: each token's chunks nibble by
// nibble, the tokens `x_stride` apart.
struct PackedRows {
    const uint8_t* packed;
    int64_t row_bytes;  // from a row to the next
    const float* scales;
    int64_t row_scales;
    const float* codebook;
    int64_t block_size, columns;
    const float* x;
    int64_t x_stride, tokens;
};

struct Linear {
    // sums[t * kTileRows + r] += Σ_k x[t * x_stride + k] · rows[r * kTileColumns + k] for kTileRows rows, float32 sums.
    void (*dot)(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype,
                float* sums);
    // sums[t * kBackwardColumns + k] += Σ_r factors[t * kTileRows + r] · rows[r * kBackwardColumns + k].
    void (*accumulate)(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums);
    // sums[t * kTileRows + r] += Σ_k x[t][k] · codebook[code k of row r] · its block's scale, for `count` ≤ kTileRows
    // rows. Null where there is no such kernel.
    void (*packed_dot)(const PackedRows& rows, int64_t count, float* sums);
};

extern const Linear linear_generic, linear_avx2, linear_avx512;

// Of the path in use.
const Linear& linear_kernel();

// The dot product of bfloat16 rows and x with AVX512-BF16, in place of linear_avx512's.
void dot_bf16_avx512bf16(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype,
                         float* sums);

}  // namespace entrenar
