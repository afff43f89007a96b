// The search for scales with AVX2: the block stays in registers' reach as float32, eight lanes at a time.
#include <cstring>

#include "codebook4/search.h"
#include "common/avx2.h"

namespace entrenar {
namespace {

// A binary search in four steps: the midpoints that step k compares with, of which there are 2^k, fit one register.
struct Tables {
    __m256 step[4];
    __m256 values_low, values_high;
    __m128i order;
};

Tables load_tables(const SearchTable& table) {
    Tables tables;
    for (int step = 0; step < 4; ++step) {
        float midpoints[8];
        for (int i = 0; i < 8; ++i) midpoints[i] = table.midpoints[(8 >> step) - 1 + (16 >> step) * (i % (1 << step))];
        tables.step[step] = _mm256_loadu_ps(midpoints);
    }
    tables.values_low = _mm256_loadu_ps(table.values);
    tables.values_high = _mm256_loadu_ps(table.values + 8);
    tables.order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.order));
    return tables;
}

// All ones where a midpoint lies below the lane; a NaN lies above all.
inline __m256i above(__m256 midpoint, __m256 scaled) {
    return _mm256_castps_si256(_mm256_cmp_ps(midpoint, scaled, _CMP_NGE_UQ));
}

// Number of midpoints below each lane; `upper`: all ones where that is 8 or more.
inline __m256i positions(const Tables& tables, __m256 scaled, __m256i* upper) {
    *upper = above(tables.step[0], scaled);
    __m256i at = _mm256_srli_epi32(*upper, 31);
    for (int step = 1; step < 4; ++step) {
        const __m256i bit = above(_mm256_permutevar8x32_ps(tables.step[step], at), scaled);
        at = _mm256_sub_epi32(_mm256_add_epi32(at, at), bit);
    }
    return at;
}

inline void consider(const Tables& tables, const float* block, const float* weights, int64_t vectors, float candidate,
                     Best* best) {
    const __m256 reciprocal = _mm256_set1_ps(1.0f / candidate);
    __m256 products = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) {
        const __m256 x = _mm256_loadu_ps(block + 8 * v);
        const __m256 scaled = _mm256_mul_ps(x, reciprocal);
        __m256i upper;
        const __m256i at = positions(tables, scaled, &upper);
        const __m256 c = _mm256_blendv_ps(_mm256_permutevar8x32_ps(tables.values_low, at),
                                          _mm256_permutevar8x32_ps(tables.values_high, at), _mm256_castsi256_ps(upper));
        const __m256 weighted = _mm256_mul_ps(_mm256_loadu_ps(weights + 8 * v), c);
        products = _mm256_add_ps(products, _mm256_mul_ps(x, weighted));
        squares = _mm256_add_ps(squares, _mm256_mul_ps(c, weighted));
    }
    const float xc = pairwise(products), cc = pairwise(squares);
    const float gain = xc * xc / cc;
    if (gain > best->gain) *best = {gain, xc / cc};
}

// 16 positions → 8 bytes: code of the even lane in the high nibble.
inline __m128i pack(const Tables& tables, __m256i first, __m256i second) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(tables.order, bytes), _mm_set1_epi16(0x0110));
    return _mm_packus_epi16(pairs, pairs);
}

template <int kDtype>
void search_blocks(const char* in, const SearchTable& table, int64_t block_size, int64_t blocks, uint8_t* codes,
                   char* scales) {
    constexpr int64_t kStride = 8 * (kDtype == kFloat32 ? 4 : 2);
    const Tables tables = load_tables(table);
    const int64_t vectors = block_size / 8;
    float block[kLargestBlock], weights[kLargestBlock];
    for (int64_t b = 0; b < blocks; ++b, scales += 4, in += vectors * kStride) {
        __m256i magnitudes = _mm256_setzero_si256();
        for (int64_t v = 0; v < vectors; ++v) {
            const __m256 x = load8<kDtype>(in + v * kStride);
            _mm256_storeu_ps(block + 8 * v, x);
            magnitudes = _mm256_max_epu32(magnitudes, magnitude_bits(x));
        }
        const uint32_t largest = largest_lane(magnitudes);
        Best best = {-1.0f, bits_float(largest)};
        if (largest >= kSmallest && largest < kInfinity) {
            const float absmax = best.scale;
            const __m256 per_largest = _mm256_set1_ps(1.0f / absmax);
            for (int64_t v = 0; v < vectors; ++v) {
                const __m256 size = _mm256_castsi256_ps(magnitude_bits(_mm256_loadu_ps(block + 8 * v)));
                _mm256_storeu_ps(weights + 8 * v, _mm256_mul_ps(size, per_largest));
            }
            for (int share = 0; share < kShares; ++share) {
                consider(tables, block, weights, vectors, absmax * kShare[share], &best);
                consider(tables, block, weights, vectors, -(absmax * kShare[share]), &best);
            }
            consider(tables, block, weights, vectors, best.scale, &best);
        }
        std::memcpy(scales, &best.scale, 4);
        const __m256 reciprocal = _mm256_set1_ps(largest >= kSmallest ? 1.0f / best.scale : 0.0f);
        for (int64_t v = 0; v < vectors; v += 2, codes += 8) {
            __m256i upper;
            const __m256 left = _mm256_loadu_ps(block + 8 * v), right = _mm256_loadu_ps(block + 8 * v + 8);
            const __m256i first = positions(tables, _mm256_mul_ps(left, reciprocal), &upper);
            const __m256i second = positions(tables, _mm256_mul_ps(right, reciprocal), &upper);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), pack(tables, first, second));
        }
    }
}

void search(const void* in, int dtype, const SearchTable& table, int64_t block_size, int64_t blocks, uint8_t* codes,
            void* scales) {
    if (block_size > kLargestBlock)
        return search_codebook_generic.blocks(in, dtype, table, block_size, blocks, codes, scales);
    const auto* from = static_cast<const char*>(in);
    auto* to = static_cast<char*>(scales);
    if (dtype == kFloat32) return search_blocks<kFloat32>(from, table, block_size, blocks, codes, to);
    if (dtype == kFloat16) return search_blocks<kFloat16>(from, table, block_size, blocks, codes, to);
    return search_blocks<kBfloat16>(from, table, block_size, blocks, codes, to);
}

}  // namespace

const SearchCodebook search_codebook_avx2 = {search};

}  // namespace entrenar
