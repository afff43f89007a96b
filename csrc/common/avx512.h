// Loads and roundings that the AVX-512 kernels share. Static, as everything that is compiled under ISA flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/floats.h"

namespace entrenar {

// 16 floats of dtype kDtype, widened.
template <int kDtype>
static inline __m512 load16(const void* from) {
    if constexpr (kDtype == kFloat32) return _mm512_loadu_ps(from);
    const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    if constexpr (kDtype == kFloat16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The first `count` of 16 floats; the rest are 0 and not read.
template <int kDtype>
static inline __m512 load_up_to_16(const void* from, int64_t count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (kDtype == kFloat32) return _mm512_maskz_loadu_ps(mask, from);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    if constexpr (kDtype == kFloat16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The bfloat16 of each lane in its upper 16 bits: nearest even, denormals kept (vcvtneps2bf16 would flush them), NaN as
// torch's 0x7FC0. The lower bits are left over.
static inline __m512i rounded_bits(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
}

static inline __m256i round_bf16(__m512 values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(values), 16));
}

// 16 floats to 16-bit floats of dtype kDtype.
template <int kDtype>
static inline __m256i round16(__m512 values) {
    if constexpr (kDtype == kBfloat16) return round_bf16(values);
    return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

// Magnitudes as integers: these order as the numbers do, with NaN the largest, as torch's amax has it.
static inline __m512i magnitude_bits(__m512 values) {
    return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
}

}  // namespace entrenar
