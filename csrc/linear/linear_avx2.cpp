// Few-token inner loops, 8 lanes of float32.
#include "common/avx2.h"
#include "common/prefetch.h"
#include "common/tokens.h"
#include "linear/linear.h"

namespace entrenar {
namespace {

template <int kDtype>
constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;

inline float sum_lanes(__m256 values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <int kDtype>
void dot_token(const char* rows, const char* x, int64_t columns, float* out) {
    __m256 sums[kTileRows] = {};
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        const __m256 token = load8<kDtype>(x + k * kBytes<kDtype>);
        for (int64_t r = 0; r < kTileRows; ++r) {
            const __m256 weight = load8<kDtype>(rows + (r * kTileColumns + k) * kBytes<kDtype>);
            sums[r] = _mm256_fmadd_ps(weight, token, sums[r]);
        }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
        float sum = sum_lanes(sums[r]);
        for (int64_t i = k; i < columns; ++i) {
            sum += load_element(rows, kDtype, r * kTileColumns + i) * load_element(x, kDtype, i);
        }
        out[r] += sum;
    }
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
    const auto* from = static_cast<const char*>(rows);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        __m256 weights[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
            weights[r] = load8<kDtype>(from + (r * kBackwardColumns + k) * kBytes<kDtype>);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = sums + t * kBackwardColumns + k;
            __m256 sum = _mm256_loadu_ps(to);
            for (int64_t r = 0; r < kTileRows; ++r) {
                sum = _mm256_fmadd_ps(_mm256_set1_ps(factors[t * kTileRows + r]), weights[r], sum);
            }
            _mm256_storeu_ps(to, sum);
        }
    }
    for (; k < columns; ++k) {
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t r = 0; r < kTileRows; ++r) {
                const float weight = load_element(from, kDtype, r * kBackwardColumns + k);
                sums[t * kBackwardColumns + k] += factors[t * kTileRows + r] * weight;
            }
        }
    }
}

void accumulate(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums) {
    const auto chosen = dtype == kFloat32   ? accumulate_tokens<kFloat32>
                        : dtype == kFloat16 ? accumulate_tokens<kFloat16>
                                            : accumulate_tokens<kBfloat16>;
    chosen(rows, factors, tokens, columns, sums);
}

// Half a chunk at a time: 8 dwords of 8 codes.
constexpr int64_t kHalf = kChunk / 2;

inline __m256i counting() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), counting());
}

// The scale of each dword's block, blocks of 2^shift codes. There are no scales behind those of `dwords`.
inline __m256 scales_of(const float* scales, int shift, int64_t dwords) {
    if (int64_t{1} << shift >= kHalf) return _mm256_set1_ps(*scales);
    const int dword_shift = shift - 3;
    const __m256i lanes = _mm256_srl_epi32(counting(), _mm_cvtsi32_si128(dword_shift));
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(scales, first_lanes(dwords >> dword_shift)), lanes);
}

// sums += scale · Σ x · value; the 16 values lie in two vectors of 8, of which a code's highest bit chooses one.
template <int kTokens>
inline void add_half(__m256i codes, __m256 low, __m256 high, __m256 scale, const float* x, int64_t x_stride,
                     __m256* sums) {
    __m256 partial[kTokens] = {};
    for (int nibble = 0; nibble < kDword; ++nibble) {
        const __m256i index = _mm256_srli_epi32(codes, 4 * nibble), top = _mm256_slli_epi32(codes, 28 - 4 * nibble);
        const __m256 small = _mm256_permutevar8x32_ps(low, index), large = _mm256_permutevar8x32_ps(high, index);
        const __m256 value = _mm256_blendv_ps(small, large, _mm256_castsi256_ps(top));
        for (int t = 0; t < kTokens; ++t) {
            partial[t] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + t * x_stride + nibble * 16), partial[t]);
        }
    }
    for (int t = 0; t < kTokens; ++t) sums[t] = _mm256_fmadd_ps(partial[t], scale, sums[t]);
}

template <int kTokens>
void packed_dot_row(const PackedRows& rows, int64_t row, float* out) {
    const uint8_t* packed = rows.packed + row * rows.row_bytes;
    const float* scales = rows.scales + row * rows.row_scales;
    const __m256 low = _mm256_loadu_ps(rows.codebook), high = _mm256_loadu_ps(rows.codebook + 8);
    const int shift = __builtin_ctzll(static_cast<uint64_t>(rows.block_size));
    __m256 sums[kTokens] = {};
    for (int64_t k = 0; k < rows.columns; k += kHalf, packed += kHalf / 2) {
        if (k % kChunk == 0) fetch_ahead(packed);
        const int64_t dwords = rows.columns - k < kHalf ? (rows.columns - k) / kDword : 8;
        const __m256i codes = dwords == 8
                                  ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed))
                                  : _mm256_maskload_epi32(reinterpret_cast<const int*>(packed), first_lanes(dwords));
        const float* from = rows.x + k / kChunk * kChunk + k % kChunk / kDword;
        add_half<kTokens>(codes, low, high, scales_of(scales + (k >> shift), shift, dwords), from, rows.x_stride, sums);
    }
    for (int t = 0; t < kTokens; ++t) out[t * kTileRows + row] += sum_lanes(sums[t]);
}

void packed_dot(const PackedRows& rows, int64_t count, float* sums) {
    for_tokens(rows.tokens, [&](auto tokens) {
        for (int64_t row = 0; row < count; ++row) packed_dot_row<tokens>(rows, row, sums);
    });
}

}  // namespace

const Linear linear_avx2 = {dot, accumulate, packed_dot};

}  // namespace entrenar
