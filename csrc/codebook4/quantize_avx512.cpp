// Codebook quantization, 16 lanes: the search over 15 midpoints is four compares and three lookups within a register.
#include <cstring>

#include "codebook4/quantize.h"
#include "common/avx512.h"

namespace entrenar {
namespace {

// Midpoints by search step: at a step of width w a lane at position p compares with midpoints[p + w − 1].
struct Search {
    __m512 eight, four, two, one;
    __m128i order;
};

Search load_search(const Nearest& nearest) {
    alignas(64) float padded[32] = {};
    std::memcpy(padded, nearest.midpoints, 15 * sizeof(float));
    return {_mm512_set1_ps(padded[7]), _mm512_loadu_ps(padded + 3), _mm512_loadu_ps(padded + 1),
            _mm512_load_ps(padded), _mm_loadu_si128(reinterpret_cast<const __m128i*>(nearest.order))};
}

// Number of midpoints below each lane. "Not ≥" rather than "<": a NaN ends at 15, as in torch.bucketize.
inline __m512i positions(const Search& search, __m512 scaled) {
    __mmask16 above = _mm512_cmp_ps_mask(search.eight, scaled, _CMP_NGE_UQ);
    __m512i at = _mm512_maskz_set1_epi32(above, 8);
    above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, search.four), scaled, _CMP_NGE_UQ);
    at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(4));
    above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, search.two), scaled, _CMP_NGE_UQ);
    at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(2));
    above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, search.one), scaled, _CMP_NGE_UQ);
    return _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(1));
}

// 16 positions → 8 bytes: code of the even lane in the high nibble.
inline __m128i pack(const Search& search, __m512i at) {
    const __m128i codes = _mm_shuffle_epi8(search.order, _mm512_cvtepi32_epi8(at));
    const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));
    return _mm_packus_epi16(pairs, pairs);
}

template <int kDtype>
void quantize_blocks(const char* in, const Nearest& nearest, int64_t block_size, int64_t blocks, uint8_t* codes,
                     char* absmax) {
    constexpr int64_t kStride = 16 * (kDtype == kFloat32 ? 4 : 2);
    const Search search = load_search(nearest);
    const int64_t vectors = block_size / 16;
    for (int64_t b = 0; b < blocks; ++b, absmax += 4) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t v = 0; v < vectors; ++v) {
            largest = _mm512_max_epu32(largest, magnitude_bits(load16<kDtype>(in + v * kStride)));
        }
        const float scale = bits_float(_mm512_reduce_max_epu32(largest));
        std::memcpy(absmax, &scale, 4);
        const __m512 reciprocal = _mm512_set1_ps(1.0f / (scale < kTiny ? kTiny : scale));
        for (int64_t v = 0; v < vectors; ++v, in += kStride, codes += 8) {
            const __m512i at = positions(search, _mm512_mul_ps(load16<kDtype>(in), reciprocal));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), pack(search, at));
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

const QuantizeCodebook quantize_codebook_avx512 = {quantize};

}  // namespace entrenar
