// Quantize to Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: one scale (and offset) per 32 elements, no search.
//
// The arithmetic follows the `gguf` package operation by operation so that bytes are equal. A block so small that the
// reciprocal of its scale overflows gives the codes that package gives on x86: what is not finite becomes code 0.
#pragma once

#include "gguf/blocks.h"
#include "gguf/lanes.h"

namespace entrenar::gguf {
namespace {

constexpr int kParts = kSmallBlock / kLanes;

struct Range {
    float low, high;
};

inline Range range_of(const float* x) {
    Floats low = load<Floats>(x), high = low;
    for (int part = 1; part < kParts; ++part) {
        const auto value = load<Floats>(x + part * kLanes);
        low = smaller(value, low);
        high = larger(value, high);
    }
    return {smallest(low), largest(high)};
}

// The first element of magnitude `size`, with its sign: which of two equals comes first decides the bytes.
inline float first_of_magnitude(const float* x, float size) {
    for (int i = 0; i < kSmallBlock; ++i) {
        if (x[i] == size || x[i] == -size) return x[i];
    }
    return x[0];
}

inline float signed_absmax(const float* x) {
    const Range range = range_of(x);
    if (range.high > -range.low) return range.high;
    if (range.high < -range.low) return range.low;
    return first_of_magnitude(x, range.high);
}

inline float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Truncate to 0…limit; what is NaN or infinite becomes 0.
inline Ints truncate(Floats value, int limit) {
    const Floats sane = copy_if((value > 0.0f) & (value < 256.0f), value);
    const Ints code = __builtin_convertvector(sane, Ints);
    return code < limit ? code : limit - Ints{};
}

// The codes of a block, packed from registers: the low nibbles hold elements 0…15, the high ones 16…31, and a fifth bit
// goes to a plane of its own.
template <int kBits>
inline void pack(const Ints* codes, uint8_t* out) {
    if (kBits == 5) {
        uint32_t fifth = 0;
        for (int part = 0; part < kParts; ++part) fifth |= sign_bits(codes[part] << 27) << (part * kLanes);
        std::memcpy(out, &fifth, 4);
        out += 4;
    }
    for (int part = 0; part < kParts / 2; ++part) {
        store_bytes((codes[part] & 15) | ((codes[part + kParts / 2] & 15) << 4), out + part * kLanes);
    }
}

// Q4_0, Q5_0: the element of largest magnitude becomes exactly −8 or −16 steps.
template <int kBits>
inline void quantize_symmetric(const float* x, uint8_t* out) {
    constexpr int kHalf = 1 << (kBits - 1);
    const float scale = signed_absmax(x) / -kHalf, inverse = reciprocal(scale);
    Ints codes[kParts];
    for (int part = 0; part < kParts; ++part) {
        codes[part] = truncate(load<Floats>(x + part * kLanes) * inverse + (kHalf + 0.5f), 2 * kHalf - 1);
    }
    write_f16(out, scale);
    pack<kBits>(codes, out + 2);
}

// Q4_1, Q5_1: an offset as well.
template <int kBits>
inline void quantize_affine(const float* x, uint8_t* out) {
    constexpr int kTop = (1 << kBits) - 1;
    Range range = range_of(x);
    if (range.low == 0.0f) range.low = first_of_magnitude(x, 0.0f);  // -0 and 0 are different bytes
    const float scale = range.high > range.low ? (range.high - range.low) / kTop : 0.0f;
    const float inverse = reciprocal(scale);
    Ints codes[kParts];
    for (int part = 0; part < kParts; ++part) {
        codes[part] = truncate((load<Floats>(x + part * kLanes) - range.low) * inverse + 0.5f, kTop);
    }
    write_f16(out, scale);
    write_f16(out + 2, range.low);
    pack<kBits>(codes, out + 4);
}

// Q8_0: rounds halves away from zero.
inline void quantize_bytes(const float* x, uint8_t* out) {
    const Range range = range_of(x);
    const float absmax = range.high > -range.low ? range.high : -range.low;
    const float scale = __builtin_fabsf(absmax) / 127.0f, inverse = reciprocal(scale);
    for (int i = 0; i < kSmallBlock; i += kLanes) {
        const Floats scaled = load<Floats>(x + i) * inverse, size = magnitude(scaled);
        const Floats sane = copy_if(size < 256.0f, size);
        const Ints whole = __builtin_convertvector(sane, Ints);
        const Ints rounded = whole - (Ints)(sane - __builtin_convertvector(whole, Floats) >= 0.5f);  // true is −1
        const Ints sign = (Ints)scaled >> 31;
        store_bytes((rounded ^ sign) - sign, out + 2 + i);
    }
    write_f16(out, scale);
}

template <void (*kQuantizeBlock)(const float*, uint8_t*), int kBlockBytes>
void quantize_blocks(const QuantizeRun& run) {
    alignas(64) float x[kSmallBlock];
    for (int64_t block = 0; block < run.blocks; ++block) {
        widen(run.in, run.dtype, block * kSmallBlock, kSmallBlock, x);
        kQuantizeBlock(x, run.out + block * kBlockBytes);
    }
}

constexpr LegacyQuantize kLegacyQuantize{
    quantize_blocks<quantize_symmetric<4>, 18>, quantize_blocks<quantize_affine<4>, 20>,
    quantize_blocks<quantize_symmetric<5>, 22>, quantize_blocks<quantize_affine<5>, 24>,
    quantize_blocks<quantize_bytes, 34>,
};

}  // namespace
}  // namespace entrenar::gguf
