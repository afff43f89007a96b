// The search for scales with AVX-512: as with AVX2, sixteen lanes at a time, sums in eight.
#include <cstring>

#include "codebook4/midpoints_avx512.h"
#include "codebook4/search.h"
#include "common/avx2.h"
#include "common/avx512.h"

namespace entrenar {
namespace {

struct Tables {
    Search search;
    __m512 values;
};

inline __m256 lower(__m512 lanes) { return _mm512_castps512_ps256(lanes); }
inline __m256 upper(__m512 lanes) { return _mm512_extractf32x8_ps(lanes, 1); }

inline void consider(const Tables& tables, const float* block, const float* weights, int64_t vectors, float candidate,
                     Best* best) {
    const __m512 reciprocal = _mm512_set1_ps(1.0f / candidate);
    __m256 products = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) {
        const __m512 x = _mm512_loadu_ps(block + 16 * v);
        const __m512 c = _mm512_permutexvar_ps(positions(tables.search, _mm512_mul_ps(x, reciprocal)), tables.values);
        const __m512 weighted = _mm512_mul_ps(_mm512_load_ps(weights + 16 * v), c);
        const __m512 xc = _mm512_mul_ps(x, weighted), cc = _mm512_mul_ps(c, weighted);
        products = _mm256_add_ps(_mm256_add_ps(products, lower(xc)), upper(xc));
        squares = _mm256_add_ps(_mm256_add_ps(squares, lower(cc)), upper(cc));
    }
    const float xc = pairwise(products), cc = pairwise(squares);
    const float gain = xc * xc / cc;
    if (gain > best->gain) *best = {gain, xc / cc};
}

template <int kDtype>
void search_blocks(const char* in, const SearchTable& table, int64_t block_size, int64_t blocks, uint8_t* codes,
                   char* scales) {
    constexpr int64_t kStride = 16 * (kDtype == kFloat32 ? 4 : 2);
    const Tables tables{load_search(table.midpoints, table.order), _mm512_loadu_ps(table.values)};
    const int64_t vectors = block_size / 16;
    alignas(64) float block[kLargestBlock], weights[kLargestBlock];
    for (int64_t b = 0; b < blocks; ++b, scales += 4, in += vectors * kStride) {
        __m512i magnitudes = _mm512_setzero_si512();
        for (int64_t v = 0; v < vectors; ++v) {
            const __m512 x = load16<kDtype>(in + v * kStride);
            _mm512_store_ps(block + 16 * v, x);
            magnitudes = _mm512_max_epu32(magnitudes, magnitude_bits(x));
        }
        const uint32_t largest = _mm512_reduce_max_epu32(magnitudes);
        Best best = {-1.0f, bits_float(largest)};
        if (largest >= kSmallest && largest < kInfinity) {
            const float absmax = best.scale;
            const __m512 per_largest = _mm512_set1_ps(1.0f / absmax);
            for (int64_t v = 0; v < vectors; ++v) {
                const __m512 size = _mm512_castsi512_ps(magnitude_bits(_mm512_load_ps(block + 16 * v)));
                _mm512_store_ps(weights + 16 * v, _mm512_mul_ps(size, per_largest));
            }
            for (int share = 0; share < kShares; ++share) {
                consider(tables, block, weights, vectors, absmax * kShare[share], &best);
                consider(tables, block, weights, vectors, -(absmax * kShare[share]), &best);
            }
            consider(tables, block, weights, vectors, best.scale, &best);
        }
        std::memcpy(scales, &best.scale, 4);
        const __m512 reciprocal = _mm512_set1_ps(largest >= kSmallest ? 1.0f / best.scale : 0.0f);
        for (int64_t v = 0; v < vectors; ++v, codes += 8) {
            const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(block + 16 * v), reciprocal);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), pack(tables.search, positions(tables.search, scaled)));
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

const SearchCodebook search_codebook_avx512 = {search};

}  // namespace entrenar
