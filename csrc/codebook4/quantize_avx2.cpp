// Codebook quantization, 8 lanes: the first compare chooses a half of the midpoints, three lookups search in it.
#include <cstring>

#include "codebook4/quantize.h"
#include "common/avx2.h"

namespace entrenar {
namespace {

// midpoints[p + w − 1] for a lane at position p of the lower or upper eight, for a step of width w = 4, 2, 1.
struct Search {
    __m256 eight, low[3], high[3];
    __m128i order;
};

Search load_search(const Nearest& nearest) {
    float padded[24] = {};
    std::memcpy(padded, nearest.midpoints, 15 * sizeof(float));
    Search search;
    search.eight = _mm256_set1_ps(padded[7]);
    for (int step = 0, width = 4; step < 3; ++step, width /= 2) {
        search.low[step] = _mm256_loadu_ps(padded + width - 1);
        search.high[step] = _mm256_loadu_ps(padded + 8 + width - 1);
    }
    search.order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nearest.order));
    return search;
}

// Number of midpoints below each lane. "Not ≥" rather than "<": a NaN ends at 15, as in torch.bucketize.
inline __m256i positions(const Search& search, __m256 scaled) {
    const __m256 upper = _mm256_cmp_ps(search.eight, scaled, _CMP_NGE_UQ);
    __m256i at = _mm256_setzero_si256();
    for (int step = 0, width = 4; step < 3; ++step, width /= 2) {
        const __m256 midpoint = _mm256_blendv_ps(_mm256_permutevar8x32_ps(search.low[step], at),
                                                 _mm256_permutevar8x32_ps(search.high[step], at), upper);
        const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(midpoint, scaled, _CMP_NGE_UQ));
        at = _mm256_add_epi32(at, _mm256_and_si256(above, _mm256_set1_epi32(width)));
    }
    return _mm256_add_epi32(at, _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8)));
}

// 16 positions → 8 bytes: code of the even lane in the high nibble.
inline __m128i pack(const Search& search, __m256i first, __m256i second) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(search.order, bytes), _mm_set1_epi16(0x0110));
    return _mm_packus_epi16(pairs, pairs);
}

template <int kDtype>
void quantize_blocks(const char* in, const Nearest& nearest, int64_t block_size, int64_t blocks, uint8_t* codes,
                     char* absmax) {
    constexpr int64_t kStride = 8 * (kDtype == kFloat32 ? 4 : 2);
    const Search search = load_search(nearest);
    const int64_t vectors = block_size / 8;
    for (int64_t b = 0; b < blocks; ++b, absmax += 4) {
        __m256i largest = _mm256_setzero_si256();
        for (int64_t v = 0; v < vectors; ++v) {
            largest = _mm256_max_epu32(largest, magnitude_bits(load8<kDtype>(in + v * kStride)));
        }
        const float scale = bits_float(largest_lane(largest));
        std::memcpy(absmax, &scale, 4);
        const __m256 reciprocal = _mm256_set1_ps(1.0f / (scale < kTiny ? kTiny : scale));
        for (int64_t v = 0; v < vectors; v += 2, in += 2 * kStride, codes += 8) {
            const __m256i first = positions(search, _mm256_mul_ps(load8<kDtype>(in), reciprocal));
            const __m256i second = positions(search, _mm256_mul_ps(load8<kDtype>(in + kStride), reciprocal));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), pack(search, first, second));
        }
    }
}

void quantize(const void* in, int dtype, const Nearest& nearest, int64_t block_size, int64_t blocks, uint8_t* codes,
              void* absmax) {
    const auto* from = static_cast<const char*>(in);
    auto* to = static_cast<char*>(absmax);
    if (dtype == kFloat32) return quantize_blocks<kFloat32>(from, nearest, block_size, blocks, codes, to);
    if (dtype == kFloat16) return quantize_blocks<kFloat16>(from, nearest, block_size, blocks, codes, to);
    return quantize_blocks<kBfloat16>(from, nearest, block_size, blocks, codes, to);
}

}  // namespace

const QuantizeCodebook quantize_codebook_avx2 = {quantize};

}  // namespace entrenar
