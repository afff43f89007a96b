// The nearest of sixteen entries with AVX-512: four compares and three lookups within a register. Static, as everything
// that is compiled under ISA flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace entrenar {

// Midpoints by search step: at a step of width w a lane at position p compares with midpoints[p + w − 1].
struct Search {
    __m512 eight, four, two, one;
    __m128i order;
};

static inline Search load_search(const float* midpoints, const uint8_t* order) {
    alignas(64) float padded[32] = {};
    std::memcpy(padded, midpoints, 15 * sizeof(float));
    return {_mm512_set1_ps(padded[7]), _mm512_loadu_ps(padded + 3), _mm512_loadu_ps(padded + 1), _mm512_load_ps(padded),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(order))};
}

// Number of midpoints below each lane. "Not ≥" rather than "<": a NaN ends at 15, as in torch.bucketize.
static inline __m512i positions(const Search& search, __m512 scaled) {
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
static inline __m128i pack(const Search& search, __m512i at) {
    const __m128i codes = _mm_shuffle_epi8(search.order, _mm512_cvtepi32_epi8(at));
    const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));
    return _mm_packus_epi16(pairs, pairs);
}

}  // namespace entrenar
