// The three float types of tensors, and exact conversions between them, one element at a time.
//
// Everything here is `static`: a header is compiled under several ISA flags, and a function shared between the objects
// would let the linker serve an AVX-512 body to a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace entrenar {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

static inline bool is_dtype(int value) { return value >= kFloat32 && value <= kBfloat16; }
static inline int64_t dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline float bf16_to_float(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

// Round to nearest even, as torch does; every NaN becomes torch's 0x7FC0.
static inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 0x3FFu;
    if (exponent == 31) return bits_float(sign | 0x7F800000u | (mantissa << 13));
    if (exponent) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // denormal half: exact in float32
    return bits_float(sign | float_bits(magnitude));
}

// Round to nearest even, as F16C and torch do; overflow gives infinity.
static inline uint16_t float_to_f16(float value) {
    const uint32_t bits = float_bits(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above
    if (magnitude < 0x38800000u) {                                               // below 2^-14: a denormal half
        // Adding 0.5 leaves the mantissa's last bit worth 2^-24, a denormal half's unit: the FPU rounds for us.
        const float aligned = bits_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(aligned) - 0x3F000000u));
    }
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Element `index` of a buffer of `dtype`, widened; memcpy because a caller's pointer need not be aligned.
static inline float load_element(const void* buffer, int dtype, int64_t index) {
    if (dtype == kFloat32) {
        float value;
        std::memcpy(&value, static_cast<const char*>(buffer) + index * 4, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const char*>(buffer) + index * 2, 2);
    return dtype == kFloat16 ? f16_to_float(half) : bf16_to_float(half);
}

static inline void store_element(void* buffer, int dtype, int64_t index, float value) {
    if (dtype == kFloat32) {
        std::memcpy(static_cast<char*>(buffer) + index * 4, &value, 4);
        return;
    }
    const uint16_t half = dtype == kFloat16 ? float_to_f16(value) : float_to_bf16(value);
    std::memcpy(static_cast<char*>(buffer) + index * 2, &half, 2);
}

}  // namespace entrenar
