// What the GGUF kernels need beyond common/lanes.h: whole tiles of any dtype, single halves.
//
// No `fused` here: these kernels give the same bytes on every path.
#pragma once

#include "common/lanes.h"

namespace entrenar::gguf {
namespace {

typedef uint8_t Sixteen __attribute__((vector_size(16)));

inline Floats copy_if(Ints mask, Floats value) { return (Floats)((Ints)value & mask); }

// Nearest integer, ties to even, of |value| < 2^22: the sum has no bits left below one.
constexpr float kRounder = 12582912.0f;
inline Floats nearest(Floats value) { return (value + kRounder) - kRounder; }
inline float nearest(float value) { return (value + kRounder) - kRounder; }

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
