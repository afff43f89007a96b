// Float vectors as wide as the instruction set of the including file (GCC and Clang vector extensions).
//
// Kernels are written once over these types and compiled once per path. They use only operations that IEEE 754 rounds
// in one way (no fused multiply-add, no reassociation: a sum runs in the order written), so every path gives the same
// bytes, whatever its width. On aarch64 the 16-byte vectors of the generic path are NEON registers.
//
// Include only from a file of one path: everything lives in an anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/floats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace entrenar::gguf {
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
typedef uint8_t Sixteen __attribute__((vector_size(16)));

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

inline Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7FFFFFFF); }
inline Floats copy_if(Ints mask, Floats value) { return (Floats)((Ints)value & mask); }

// Nearest integer, ties to even, of |value| < 2^22: the sum has no bits left below one.
constexpr float kRounder = 12582912.0f;
inline Floats nearest(Floats value) { return (value + kRounder) - kRounder; }
inline float nearest(float value) { return (value + kRounder) - kRounder; }

// Codes of 0…255 or −128…127 to bytes. (The compiler's own conversion is slow below AVX-512.)
inline void store_bytes(Ints codes, void* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)(codes & 255)),
                                           _mm256_extracti128_si256((__m256i)(codes & 255), 1));
    const __m128i bytes = _mm_packus_epi16(halves, halves);
    std::memcpy(to, &bytes, kLanes);
#elif defined(__SSE2__) && !defined(__AVX512F__)
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

// The sign bit of every lane, lane 0 in bit 0.
inline uint32_t sign_bits(Ints value) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)value);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)value));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)value));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (value[lane] < 0 ? 1u : 0u) << lane;
    return bits;
#endif
}

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

inline Floats widen_bf16(const char* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

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

inline void narrow_bf16(Floats value, char* to) {
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Ints is_nan = value != value;
    store(to, __builtin_convertvector(is_nan ? 0x7FC0u - Words{} : rounded, Halves));
}

// `count` elements (a multiple of kLanes) of any dtype to float32, and back.
inline void widen(const void* in, int dtype, int64_t first, int count, float* out) {
    const char* from = static_cast<const char*>(in) + first * dtype_bytes(dtype);
    for (int i = 0; i < count; i += kLanes) {
        if (dtype == kFloat32) {
            store(out + i, load<Floats>(from + i * 4));
        } else {
            store(out + i, dtype == kFloat16 ? widen_f16(from + i * 2) : widen_bf16(from + i * 2));
        }
    }
}

inline void narrow(const char* in, int count, char* out, int dtype) {
    for (int i = 0; i < count; i += kLanes) {
        const auto value = load<Floats>(in + i * 4);
        if (dtype == kFloat16) {
            narrow_f16(value, out + i * 2);
        } else {
            narrow_bf16(value, out + i * 2);
        }
    }
}

#if defined(__F16C__)
inline float read_f16(const uint8_t* from) { return _cvtsh_ss(load<uint16_t>(from)); }
inline void write_f16(uint8_t* to, float value) { store(to, _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline float read_f16(const uint8_t* from) { return load_element(from, kFloat16, 0); }
inline void write_f16(uint8_t* to, float value) { store_element(to, kFloat16, 0, value); }
#endif
inline float round_to_f16(float value) { return f16_to_float(float_to_f16(value)); }

}  // namespace
}  // namespace entrenar::gguf
