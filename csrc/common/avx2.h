// Loads and roundings that the AVX2 kernels share. Static, as everything that is compiled under ISA flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/floats.h"

namespace entrenar {

// 8 floats of dtype kDtype, widened.
template <int kDtype>
static inline __m256 load8(const void* from) {
    if constexpr (kDtype == kFloat32) return _mm256_loadu_ps(static_cast<const float*>(from));
    const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(from));
    if constexpr (kDtype == kFloat16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// To bfloat16, nearest even, denormals kept, NaN as torch's 0x7FC0.
static inline __m128i round_bf16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256i top =
        _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(nan));
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

// 8 floats to 16-bit floats of dtype kDtype.
template <int kDtype>
static inline __m128i round8(__m256 values) {
    if constexpr (kDtype == kBfloat16) return round_bf16(values);
    return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

// 8 floats stored as kDtype.
template <int kDtype>
static inline void store8(void* to, __m256 values) {
    if constexpr (kDtype == kFloat32) {
        _mm256_storeu_ps(static_cast<float*>(to), values);
    } else {
        _mm_storeu_si128(static_cast<__m128i*>(to), round8<kDtype>(values));
    }
}

// Magnitudes as integers: these order as the numbers do, with NaN the largest, as torch's amax has it.
static inline __m256i magnitude_bits(__m256 values) {
    return _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7FFFFFFF));
}

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
static inline float pairwise(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline uint32_t largest_lane(__m256i values) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

}  // namespace entrenar
