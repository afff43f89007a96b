// Every type is unpacked to codes with a scale and a minimum for each group of them: scale · (code − offset) − minimum.
//
// A type without minimum has 0 there: subtracting +0 changes no value, not even −0.
#pragma once

#include "gguf/blocks.h"
#include "gguf/lanes.h"

namespace entrenar::gguf {
namespace {

struct Unpacked {
    alignas(64) int8_t codes[kSuperBlock];
    float scale[16], minimum[16];  // one for each group
    uint32_t fifth;                // bit i is bit 4 of code i, for blocks of 32 with five bits
};

inline void split_nibbles(const uint8_t* packed, int count, int8_t* low, int8_t* high) {
    for (int i = 0; i < count; i += 16) {  // explicit vectors: a plain loop over 16 bytes is unrolled into scalars
        const auto both = load<Sixteen>(packed + i);
        store(low + i, both & 15);
        store(high + i, both >> 4);
    }
}

// codes[i] |= bit `from` of bits[i], moved to bit `to`.
inline void add_bit_plane(const uint8_t* bits, int count, int from, int to, int8_t* codes) {
    for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(codes[i] | (((bits[i] >> from) & 1) << to));
}

// --- blocks of 32 ---

inline void unpack_q4_0(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    split_nibbles(block + 2, 16, to.codes, to.codes + 16);
}

inline void unpack_q4_1(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = -read_f16(block + 2);
    split_nibbles(block + 4, 16, to.codes, to.codes + 16);
}

inline void unpack_q5_0(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    split_nibbles(block + 6, 16, to.codes, to.codes + 16);
    std::memcpy(&to.fifth, block + 2, 4);
}

inline void unpack_q5_1(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = -read_f16(block + 2);
    split_nibbles(block + 8, 16, to.codes, to.codes + 16);
    std::memcpy(&to.fifth, block + 4, 4);
}

inline void unpack_q8_0(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    std::memcpy(to.codes, block + 2, kSmallBlock);
}

// The 16 values of IQ4_NL, closer together near zero.
constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline void unpack_iq4_nl(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    split_nibbles(block + 2, 16, to.codes, to.codes + 16);
#if defined(__SSSE3__)
    for (int i = 0; i < kSmallBlock; i += 16) {
        store(to.codes + i, _mm_shuffle_epi8(load<__m128i>(kNonLinear), load<__m128i>(to.codes + i)));
    }
#else
    for (int i = 0; i < kSmallBlock; ++i) to.codes[i] = kNonLinear[static_cast<int>(to.codes[i])];
#endif
}

// --- super-blocks of 256 ---

// Two-bit codes: each run of 32 bytes holds 128 elements, 32 for every pair of bits. Moved up by kShift.
template <int kShift>
inline void split_pairs(const uint8_t* packed, int8_t* codes) {
    for (int half = 0; half < 2; ++half) {
        for (int pair = 0; pair < 4; ++pair) {
            for (int i = 0; i < 32; ++i) {
                codes[half * 128 + pair * 32 + i] =
                    static_cast<int8_t>(((packed[half * 32 + i] >> (2 * pair)) & 3) << kShift);
            }
        }
    }
}

inline void unpack_q2_k(const uint8_t* block, Unpacked& to) {
    const float scale = read_f16(block + 80), minimum = read_f16(block + 82);
    for (int group = 0; group < 16; group += kLanes) {
        const Ints both = load_bytes(reinterpret_cast<const int8_t*>(block) + group);
        store(to.scale + group, scale * __builtin_convertvector(both & 15, Floats));
        store(to.minimum + group, minimum * __builtin_convertvector((both >> 4) & 15, Floats));
    }
    split_pairs<0>(block + 16, to.codes);
}

inline void unpack_q3_k(const uint8_t* block, Unpacked& to) {
    const uint8_t *high_bits = block, *scales = block + 96;
    const float scale = read_f16(block + 108);
    for (int group = 0; group < 16; ++group) {
        const int low = (scales[group % 8] >> (group / 8 * 4)) & 15,
                  high = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        to.scale[group] = scale * static_cast<float>((low | (high << 4)) - 32);
        to.minimum[group] = 0.0f;
    }
    split_pairs<0>(block + 32, to.codes);
    // A third bit that is set means: nothing to subtract. With the offset of 4, codes are −4…3.
    for (int part = 0; part < 8; ++part) add_bit_plane(high_bits, 32, part, 2, to.codes + part * 32);
}

// Eight 6-bit scales and eight 6-bit minima in 12 bytes (Q4_K, Q5_K).
inline void unpack_scales(const uint8_t* block, Unpacked& to) {
    const float scale = read_f16(block), minimum = read_f16(block + 2);
    const uint8_t* packed = block + 4;
    for (int group = 0; group < 4; ++group) {
        const int first = packed[group], second = packed[group + 4], rest = packed[group + 8];
        to.scale[group] = scale * static_cast<float>(first & 63);
        to.minimum[group] = minimum * static_cast<float>(second & 63);
        to.scale[group + 4] = scale * static_cast<float>((rest & 15) | (first >> 6 << 4));
        to.minimum[group + 4] = minimum * static_cast<float>((rest >> 4) | (second >> 6 << 4));
    }
}

// Each 32 bytes: the low nibbles are 32 elements, the high nibbles the next 32.
inline void split_wide_nibbles(const uint8_t* packed, int8_t* codes) {
    for (int part = 0; part < 4; ++part) {
        split_nibbles(packed + part * 32, 32, codes + part * 64, codes + part * 64 + 32);
    }
}

inline void unpack_q4_k(const uint8_t* block, Unpacked& to) {
    unpack_scales(block, to);
    split_wide_nibbles(block + 16, to.codes);
}

inline void unpack_q5_k(const uint8_t* block, Unpacked& to) {
    unpack_scales(block, to);
    split_wide_nibbles(block + 48, to.codes);
    for (int part = 0; part < 8; ++part) add_bit_plane(block + 16, 32, part, 4, to.codes + part * 32);
}

// Halves of 128 elements: 64 bytes of low nibbles, 32 bytes of high pairs.
inline void unpack_q6_k(const uint8_t* block, Unpacked& to) {
    const float scale = read_f16(block + 208);
    for (int group = 0; group < 16; group += kLanes) {
        const Ints scales = load_bytes(reinterpret_cast<const int8_t*>(block) + 192 + group);
        store(to.scale + group, scale * __builtin_convertvector(scales, Floats));
        store(to.minimum + group, Floats{});
    }
    split_pairs<4>(block + 128, to.codes);
    for (int part = 0; part < 4; ++part) {
        const uint8_t* low = block + part / 2 * 64;
        int8_t* codes = to.codes + part * 64;
        for (int i = 0; i < 64; ++i) codes[i] = static_cast<int8_t>(codes[i] | ((low[i] >> (part % 2 * 4)) & 15));
    }
}

// --- codes in lanes ---

// 16 in the lanes whose code has its fifth bit set, for the codes from `first`.
inline Ints fifth_bits(uint32_t fifth, int first) {
    Ints lane_bit;
    for (int lane = 0; lane < kLanes; ++lane) lane_bit[lane] = 1 << lane;
    return (((static_cast<int32_t>(fifth >> first) & lane_bit) == 0) + 1) << 4;
}

template <bool kFifth>
inline Ints codes_at(const Unpacked& from, int first) {
    const Ints codes = load_bytes(from.codes + first);
    return kFifth ? codes | fifth_bits(from.fifth, first) : codes;
}

// A kernel template's instances for every type.
template <class Table, template <void (*)(const uint8_t*, Unpacked&), int, int, int, int, bool> class Kernel>
constexpr Table table_of() {
    return {
        Kernel<unpack_q4_0, 18, 32, 32, 8, false>::run,   Kernel<unpack_q4_1, 20, 32, 32, 0, false>::run,
        Kernel<unpack_q5_0, 22, 32, 32, 16, true>::run,   Kernel<unpack_q5_1, 24, 32, 32, 0, true>::run,
        Kernel<unpack_q8_0, 34, 32, 32, 0, false>::run,   Kernel<unpack_q2_k, 84, 256, 16, 0, false>::run,
        Kernel<unpack_q3_k, 110, 256, 16, 4, false>::run, Kernel<unpack_q4_k, 144, 256, 32, 0, false>::run,
        Kernel<unpack_q5_k, 176, 256, 32, 0, false>::run, Kernel<unpack_q6_k, 210, 256, 16, 32, false>::run,
        Kernel<unpack_iq4_nl, 18, 32, 32, 0, false>::run,
    };
}

}  // namespace
}  // namespace entrenar::gguf
