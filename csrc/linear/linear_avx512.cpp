// Few-token inner loops, 16 lanes of float32.
#include "common/avx512.h"
#include "common/prefetch.h"
#include "common/tokens.h"
#include "linear/linear.h"

namespace entrenar {
namespace {

template <int kDtype>
constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;

// Add the products of 16 (or, masked, fewer) columns to one sum per row.
template <int kDtype>
inline void add16(const char* rows, __m512 x, int64_t k, int64_t count, __m512* sums) {
    for (int64_t r = 0; r < kTileRows; ++r) {
        const char* from = rows + (r * kTileColumns + k) * kBytes<kDtype>;
        const __m512 weight = count == 16 ? load16<kDtype>(from) : load_up_to_16<kDtype>(from, count);
        sums[r] = _mm512_fmadd_ps(weight, x, sums[r]);
    }
}

template <int kDtype>
void dot_token(const char* rows, const char* x, int64_t columns, float* out) {
    __m512 sums[kTileRows] = {}, others[kTileRows] = {};
    int64_t k = 0;
    for (; k + 32 <= columns; k += 32) {
        add16<kDtype>(rows, load16<kDtype>(x + k * kBytes<kDtype>), k, 16, sums);
        add16<kDtype>(rows, load16<kDtype>(x + (k + 16) * kBytes<kDtype>), k + 16, 16, others);
    }
    for (; k < columns; k += 16) {
        const int64_t count = columns - k < 16 ? columns - k : 16;
        add16<kDtype>(rows, load_up_to_16<kDtype>(x + k * kBytes<kDtype>, count), k, count, sums);
    }
    for (int64_t r = 0; r < kTileRows; ++r) out[r] += _mm512_reduce_add_ps(_mm512_add_ps(sums[r], others[r]));
}

template <int kDtype>
void dot_tokens(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
        const char* token = static_cast<const char*>(x) + t * x_stride * kBytes<kDtype>;
        dot_token<kDtype>(static_cast<const char*>(rows), token, columns, sums + t * kTileRows);
    }
}

void dot(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype, float* sums) {
    const auto chosen = dtype == kFloat32   ? dot_tokens<kFloat32>
                        : dtype == kFloat16 ? dot_tokens<kFloat16>
                                            : dot_tokens<kBfloat16>;
    chosen(rows, x, x_stride, tokens, columns, sums);
}

template <int kDtype>
void accumulate_tokens(const void* rows, const float* factors, int64_t tokens, int64_t columns, float* sums) {
    // Whole vectors: a tile is 512 wide in memory whatever `columns` is, and what is beyond is not used.
    for (int64_t k = 0; k < columns; k += 16) {
        __m512 weights[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
            const char* from = static_cast<const char*>(rows) + (r * kBackwardColumns + k) * kBytes<kDtype>;
            weights[r] = load_up_to_16<kDtype>(from, columns - k < 16 ? columns - k : 16);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = sums + t * kBackwardColumns + k;
            __m512 sum = _mm512_loadu_ps(to);
            for (int64_t r = 0; r < kTileRows; ++r) {
                sum = _mm512_fmadd_ps(_mm512_set1_ps(factors[t * kTileRows + r]), weights[r], sum);
            }
            _mm512_storeu_ps(to, sum);
        }
    }
}

void accumulate(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums) {
    const auto chosen = dtype == kFloat32   ? accumulate_tokens<kFloat32>
                        : dtype == kFloat16 ? accumulate_tokens<kFloat16>
                                            : accumulate_tokens<kBfloat16>;
    chosen(rows, factors, tokens, columns, sums);
}

// The scale of each lane's block, from the scales of the blocks that a chunk lies in or spans.
struct ChunkScales {
    __m512i lanes;
    __mmask16 mask;
    int64_t block_size;

    explicit ChunkScales(int64_t size) : block_size(size) {
        const __m512i first =
            _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 3);
        const unsigned shift = static_cast<unsigned>(__builtin_ctzll(static_cast<uint64_t>(size)));
        lanes = size < kChunk ? _mm512_srl_epi32(first, _mm_cvtsi32_si128(static_cast<int>(shift)))
                              : _mm512_setzero_si512();
        mask = static_cast<__mmask16>(size < kChunk ? (1u << (kChunk >> shift)) - 1 : 1u);
    }

    __m512 of(const float* scales, int64_t chunk) const {
        return _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(mask, scales + chunk * kChunk / block_size));
    }

    // Of a last chunk of fewer codes: there are no scales behind its own.
    void shorten(int64_t columns) {
        if (block_size < kChunk) mask = static_cast<__mmask16>((1u << (columns / block_size)) - 1);
    }
};

// sums[row][token] += scale · Σ x · value over one chunk of codes of each row.
template <int kTokens, int kRows>
inline void add_chunk(__m512i* codes, __m512 values, const __m512* scales, const float* x, int64_t x_stride,
                      __m512 (*sums)[kTokens]) {
    __m512 partial[kRows][kTokens] = {};
    for (int nibble = 0; nibble < 8; ++nibble) {
        __m512 token[kTokens];
        for (int t = 0; t < kTokens; ++t) token[t] = _mm512_loadu_ps(x + t * x_stride + nibble * 16);
        for (int r = 0; r < kRows; ++r) {
            const __m512 value = _mm512_permutexvar_ps(codes[r], values);  // looks at the lowest four bits alone
            for (int t = 0; t < kTokens; ++t) partial[r][t] = _mm512_fmadd_ps(value, token[t], partial[r][t]);
            codes[r] = _mm512_srli_epi32(codes[r], 4);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_fmadd_ps(partial[r][t], scales[r], sums[r][t]);
    }
}

// Several rows side by side: what is loaded of x serves all of them.
template <int kTokens, int kRows>
void packed_dot_rows(const PackedRows& rows, int64_t first, float* out) {
    const uint8_t* packed = rows.packed + first * rows.row_bytes;
    const float* scales = rows.scales + first * rows.row_scales;
    const __m512 values = _mm512_loadu_ps(rows.codebook);
    ChunkScales chunk_scales(rows.block_size);
    __m512 sums[kRows][kTokens] = {}, scale[kRows];
    __m512i codes[kRows];
    const int64_t chunks = rows.columns / kChunk, left = rows.columns % kChunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int r = 0; r < kRows; ++r) {
            const uint8_t* at = packed + r * rows.row_bytes + chunk * (kChunk / 2);
            fetch_ahead(packed + (chunk * kRows + r) * (kChunk / 2));  // from end to end, as rows follow one another
            codes[r] = _mm512_loadu_si512(at);
            scale[r] = chunk_scales.of(scales + r * rows.row_scales, chunk);
        }
        add_chunk<kTokens, kRows>(codes, values, scale, rows.x + chunk * kChunk, rows.x_stride, sums);
    }
    if (left > 0) {
        chunk_scales.shorten(left);
        const auto there = static_cast<__mmask16>((1u << (left / kDword)) - 1);
        for (int r = 0; r < kRows; ++r) {
            codes[r] = _mm512_maskz_loadu_epi32(there, packed + r * rows.row_bytes + chunks * (kChunk / 2));
            scale[r] = chunk_scales.of(scales + r * rows.row_scales, chunks);
        }
        add_chunk<kTokens, kRows>(codes, values, scale, rows.x + chunks * kChunk, rows.x_stride, sums);
    }
    for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) out[t * kTileRows + first + r] += _mm512_reduce_add_ps(sums[r][t]);
    }
}

void packed_dot(const PackedRows& rows, int64_t count, float* sums) {
    for_tokens(rows.tokens, [&](auto tokens) {
        constexpr int kRows = tokens == 1 ? 4 : 2;  // as many as there are registers for
        int64_t row = 0;
        for (; row + kRows <= count; row += kRows) packed_dot_rows<tokens, kRows>(rows, row, sums);
        for (; row < count; ++row) packed_dot_rows<tokens, 1>(rows, row, sums);
    });
}

}  // namespace

const Linear linear_avx512 = {dot, accumulate, packed_dot};

}  // namespace entrenar
