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
    Range range{low[0], high[0]};
    for (int lane = 1; lane < kLanes; ++lane) {
        range.low = low[lane] < range.low ? low[lane] : range.low;
        range.high = high[lane] > range.high ? high[lane] : range.high;
    }
    return range;
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

inline void store_codes(Ints codes, uint8_t* to) { store(to, __builtin_convertvector(codes, Bytes)); }

// Low nibbles hold elements 0…15, high nibbles 16…31.
inline void pack_nibbles(const uint8_t* codes, uint8_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[i + 16] << 4));
}

// Bit 4 of every code; bit i belongs to element i.
inline void pack_fifth_bits(const uint8_t* codes, uint8_t* out) {
    for (int byte = 0; byte < 4; ++byte) {
        uint64_t eight;
        std::memcpy(&eight, codes + byte * 8, 8);
        // The multiplication gathers the lowest bits of eight bytes in the top byte, in order.
        out[byte] = static_cast<uint8_t>((((eight >> 4) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
    }
}

template <int kBits>
inline void pack(const uint8_t* codes, uint8_t* out) {
    if (kBits == 5) {
        pack_fifth_bits(codes, out);
        out += 4;
    }
    pack_nibbles(codes, out);
}

// Q4_0, Q5_0: the element of largest magnitude becomes exactly −8 or −16 steps.
template <int kBits>
inline void quantize_symmetric(const float* x, uint8_t* out) {
    constexpr int kHalf = 1 << (kBits - 1);
    const float scale = signed_absmax(x) / -kHalf, inverse = reciprocal(scale);
    uint8_t codes[kSmallBlock];
    for (int i = 0; i < kSmallBlock; i += kLanes) {
        store_codes(truncate(load<Floats>(x + i) * inverse + (kHalf + 0.5f), 2 * kHalf - 1), codes + i);
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
    const float scale = (range.high - range.low) / kTop, inverse = reciprocal(scale);
    uint8_t codes[kSmallBlock];
    for (int i = 0; i < kSmallBlock; i += kLanes) {
        store_codes(truncate((load<Floats>(x + i) - range.low) * inverse + 0.5f, kTop), codes + i);
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
        store_codes((rounded ^ sign) - sign, out + 2 + i);
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
