// Float vectors as wide as the instruction set of the including file (GCC and Clang vector extensions).
//
// Kernels are written once over these types and compiled once per path. All but `fused`, `reciprocal` and `sum` is
// rounded by IEEE 754 in one way (no fused multiply-add, no reassociation), so that a kernel which does without those
// gives the same bytes on every path, whatever its width. On aarch64 the 16-byte vectors of the generic path are NEON
// registers.
//
// Include only from a file of one path: everything lives in an anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/floats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace entrenar {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef float Quad __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Vector>
inline void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof value);
}

inline Floats all(float value) { return value - Floats{}; }

// Of a NaN and a number these return the second argument, as SSE's minps and maxps do.
template <class Value>
inline Value smaller(Value a, Value b) {
    return a < b ? a : b;
}

template <class Value>
inline Value larger(Value a, Value b) {
    return a > b ? a : b;
}

#if defined(__AVX512F__)
// The compiler makes a compare and a move of the above where an operand is constant.
inline Floats smaller(Floats a, Floats b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
#elif defined(__AVX2__)
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#endif

// Smallest and largest lane; which of two zeros, or what of a NaN, depends on the width.
inline float smallest(Floats value) {
    Quad parts[kLanes / 4];
    std::memcpy(parts, &value, sizeof value);
    for (int count = kLanes / 8; count > 0; count /= 2) {
        for (int i = 0; i < count; ++i) parts[i] = smaller(parts[i], parts[i + count]);
    }
    return smaller(smaller(parts[0][0], parts[0][1]), smaller(parts[0][2], parts[0][3]));
}

inline float largest(Floats value) { return -smallest(-value); }

inline float sum(Floats value) {
    Quad parts[kLanes / 4];
    std::memcpy(parts, &value, sizeof value);
    for (int count = kLanes / 8; count > 0; count /= 2) {
        for (int i = 0; i < count; ++i) parts[i] += parts[i + count];
    }
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// a · b + c: rounded once where the path has the instruction, twice where it has not.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// 1 / value for 2^-126 ≤ |value| < 2^126, within 1 ulp: an estimate of 14 bits and a Newton step take 2 cycles where
// AVX-512's division takes 10. NaN passes.
inline Floats reciprocal(Floats value) {
#if defined(__AVX512F__)
    const Floats guess = _mm512_maskz_rcp14_ps(0xFFFF, value);  // the unmasked form warns in GCC 12
    return fused(fused(-value, guess, all(1.0f)), guess, guess);
#else
    return 1.0f / value;
#endif
}

inline Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7FFFFFFF); }

inline Floats widen_f16(const char* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));  // the unmasked form warns in GCC 12
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    const Words half = __builtin_convertvector(load<Halves>(from), Words), size = (half & 0x7FFFu) << 13;
    const Words value = (Words)((Floats)size * 0x1p112f);  // moves the exponent's bias; denormals come out right
    const Words special = (Words)(size >= 0x0F800000u) & 0x7F800000u;  // infinity and NaN
    return (Floats)(value | special | ((half & 0x8000u) << 16));
#endif
}

// __builtin_convertvector between 16 and 32 bits makes several shuffles of what is one instruction (GCC 12).
inline Words words_of(const char* halves) {
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, load<__m256i>(halves));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32(load<__m128i>(halves));
#else
    return __builtin_convertvector(load<Halves>(halves), Words);
#endif
}

// The lower 16 bits of each lane.
inline void store_halves(Words value, char* to) {
#if defined(__AVX512F__)
    store(to, _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)value));
#elif defined(__AVX2__)
    const __m256i packed =
        _mm256_packus_epi32(_mm256_and_si256((__m256i)value, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256());
    store(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    store(to, __builtin_convertvector(value, Halves));
#endif
}

inline Floats widen_bf16(const char* from) { return (Floats)(words_of(from) << 16); }

inline void narrow_f16(Floats value, char* to) {
#if defined(__AVX512F__)
    store(to, _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    // common/floats.h's float_to_f16, in lanes.
    const Words bits = (Words)value, size = bits & 0x7FFFFFFFu;
    const Words normal = (size + 0xFFFu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    const Words denormal = (Words)((Floats)size + 0.5f) - 0x3F000000u;
    Words half = size < 0x38800000u ? denormal : normal;
    half = size >= 0x477FF000u ? 0x7C00u - Words{} : half;
    half = size > 0x7F800000u ? 0x7E00u - Words{} : half;
    store(to, __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves));
#endif
}

// The bfloat16 of each lane in its upper 16 bits, nearest even, NaN as torch's 0x7FC0; the lower bits are left over.
inline Words rounded_bf16(Floats value) {
    const Words bits = (Words)value;
    const Words rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    const Ints is_nan = value != value;
    return is_nan ? 0x7FC00000u - Words{} : rounded;
}

inline void narrow_bf16(Floats value, char* to) { store_halves(rounded_bf16(value) >> 16, to); }

// Codes of 0…255 or −128…127 to bytes. (The compiler's own conversion is slow.)
inline void store_bytes(Ints codes, void* to) {
#if defined(__AVX512F__)
    store(to, _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)codes));
#elif defined(__AVX2__)
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)(codes & 255)),
                                           _mm256_extracti128_si256((__m256i)(codes & 255), 1));
    const __m128i bytes = _mm_packus_epi16(halves, halves);
    std::memcpy(to, &bytes, kLanes);
#elif defined(__SSE2__)
    const __m128i halves = _mm_packs_epi32((__m128i)(codes & 255), (__m128i)(codes & 255));
    const __m128i bytes = _mm_packus_epi16(halves, halves);
    std::memcpy(to, &bytes, kLanes);
#else
    store(to, __builtin_convertvector(codes, Bytes));
#endif
}

// Signed bytes to lanes. (As above.)
inline Ints load_bytes(const int8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_cvtsi32_si128(load<int32_t>(from)), halves = _mm_unpacklo_epi8(bytes, bytes);
    return (Ints)_mm_srai_epi32(_mm_unpacklo_epi16(halves, halves), 24);
#else
    return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

}  // namespace
}  // namespace entrenar
