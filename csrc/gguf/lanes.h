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

#if defined(__F16C__)
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
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7FFFFFFF); }
inline Floats copy_if(Ints mask, Floats value) { return (Floats)((Ints)value & mask); }

// Nearest integer, ties to even, of |value| < 2^22: the sum has no bits left below one.
constexpr float kRounder = 12582912.0f;
inline Floats nearest(Floats value) { return (value + kRounder) - kRounder; }
inline float nearest(float value) { return (value + kRounder) - kRounder; }

inline Floats widen_f16(const char* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));  // the unmasked form warns in GCC 12
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    Floats value{};
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = load_element(from, kFloat16, lane);
    return value;
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
    for (int lane = 0; lane < kLanes; ++lane) store_element(to, kFloat16, lane, value[lane]);
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
    if (dtype == kFloat32) {
        std::memcpy(out, from, static_cast<size_t>(count) * 4);
        return;
    }
    for (int i = 0; i < count; i += kLanes) {
        store(out + i, dtype == kFloat16 ? widen_f16(from + i * 2) : widen_bf16(from + i * 2));
    }
}

inline void narrow(const float* in, int count, char* out, int dtype) {
    for (int i = 0; i < count; i += kLanes) {
        const auto value = load<Floats>(in + i);
        if (dtype == kFloat16) {
            narrow_f16(value, out + i * 2);
        } else {
            narrow_bf16(value, out + i * 2);
        }
    }
}

inline float read_f16(const uint8_t* from) { return load_element(from, kFloat16, 0); }
inline void write_f16(uint8_t* to, float value) { store_element(to, kFloat16, 0, value); }
inline float round_to_f16(float value) { return f16_to_float(float_to_f16(value)); }

}  // namespace
}  // namespace entrenar::gguf
