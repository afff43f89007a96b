// Dequantize: every type is unpacked to signed codes with a scale and a minimum for each group of them, and one loop
// turns those into values: scale · code − minimum, each operation rounded to float32 as in the `gguf` package.
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
};


inline void split_nibbles(const uint8_t* packed, int count, int8_t* low, int8_t* high) {
    for (int i = 0; i < count; ++i) {
        low[i] = static_cast<int8_t>(packed[i] & 15);
        high[i] = static_cast<int8_t>(packed[i] >> 4);
    }
}

// codes[i] |= bit `from` of bits[i], moved to bit `to`.
inline void add_bit_plane(const uint8_t* bits, int count, int from, int to, int8_t* codes) {
    for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(codes[i] | (((bits[i] >> from) & 1) << to));
}

inline void subtract(int8_t* codes, int count, int offset) {
    for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(codes[i] - offset);
}

// --- blocks of 32 ---

inline void unpack_q4_0(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    split_nibbles(block + 2, 16, to.codes, to.codes + 16);
    subtract(to.codes, kSmallBlock, 8);
}

inline void unpack_q4_1(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = -read_f16(block + 2);
    split_nibbles(block + 4, 16, to.codes, to.codes + 16);
}

// Bit i of the four bytes is the fifth bit of code i.
inline void add_fifth_bits(const uint8_t* packed, int8_t* codes) {
    uint8_t bits[kSmallBlock];
    for (int i = 0; i < kSmallBlock; ++i) bits[i] = static_cast<uint8_t>(packed[i / 8] >> (i % 8));
    add_bit_plane(bits, kSmallBlock, 0, 4, codes);
}

inline void unpack_q5_0(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = 0.0f;
    split_nibbles(block + 6, 16, to.codes, to.codes + 16);
    add_fifth_bits(block + 2, to.codes);
    subtract(to.codes, kSmallBlock, 16);
}

inline void unpack_q5_1(const uint8_t* block, Unpacked& to) {
    to.scale[0] = read_f16(block);
    to.minimum[0] = -read_f16(block + 2);
    split_nibbles(block + 8, 16, to.codes, to.codes + 16);
    add_fifth_bits(block + 4, to.codes);
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
    for (int i = 0; i < 16; ++i) {
        to.codes[i] = kNonLinear[block[2 + i] & 15];
        to.codes[16 + i] = kNonLinear[block[2 + i] >> 4];
    }
}

// --- super-blocks of 256 ---

// Two-bit codes: each run of 32 bytes holds 128 elements, 32 for every pair of bits.
inline void split_pairs(const uint8_t* packed, int8_t* codes) {
    for (int i = 0; i < kSuperBlock; ++i) {
        codes[i] = static_cast<int8_t>((packed[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3);
    }
}

inline void unpack_q2_k(const uint8_t* block, Unpacked& to) {
    const float scale = read_f16(block + 80), minimum = read_f16(block + 82);
    for (int group = 0; group < 16; ++group) {
        to.scale[group] = scale * static_cast<float>(block[group] & 15);
        to.minimum[group] = minimum * static_cast<float>(block[group] >> 4);
    }
    split_pairs(block + 16, to.codes);
}

inline void unpack_q3_k(const uint8_t* block, Unpacked& to) {
    const uint8_t *high_bits = block, *scales = block + 96;
    const float scale = read_f16(block + 108);
    for (int group = 0; group < 16; ++group) {
        const int low = (scales[group % 8] >> (group / 8 * 4)) & 15, high = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        to.scale[group] = scale * static_cast<float>((low | (high << 4)) - 32);
        to.minimum[group] = 0.0f;
    }
    split_pairs(block + 32, to.codes);
    for (int part = 0; part < 8; ++part) add_bit_plane(high_bits, 32, part, 2, to.codes + part * 32);
    subtract(to.codes, kSuperBlock, 4);  // the third bit set means: nothing to subtract
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
    for (int group = 0; group < 16; ++group) {
        to.scale[group] = scale * static_cast<float>(static_cast<int8_t>(block[192 + group]));
        to.minimum[group] = 0.0f;
    }
    split_pairs(block + 128, to.codes);
    for (int i = 0; i < kSuperBlock; ++i) {
        const int half = i / 128, low = (block[half * 64 + i % 64] >> (i / 64 % 2 * 4)) & 15;
        to.codes[i] = static_cast<int8_t>((low | (to.codes[i] << 4)) - 32);
    }
}

// --- codes to values ---

template <int kGroup>
inline void expand(const Unpacked& from, int elements, char* out) {
    for (int group = 0; group < elements / kGroup; ++group) {
        const float scale = from.scale[group], minimum = from.minimum[group];
        for (int i = group * kGroup; i < (group + 1) * kGroup; i += kLanes) {
            const Ints codes = __builtin_convertvector(load<Bytes>(from.codes + i), Ints);
            store(out + i * 4, scale * __builtin_convertvector(codes, Floats) - minimum);
        }
    }
}

template <void (*kUnpack)(const uint8_t*, Unpacked&), int kBytes, int kElements, int kGroup>
void dequantize_blocks(const DequantizeRun& run) {
    Unpacked unpacked;
    alignas(64) float values[kElements];
    const int64_t step = kElements * dtype_bytes(run.dtype);
    for (int64_t block = 0; block < run.blocks; ++block) {
        kUnpack(run.in + block * kBytes, unpacked);
        char* out = static_cast<char*>(run.out) + block * step;
        if (run.dtype == kFloat32) {
            expand<kGroup>(unpacked, kElements, out);
        } else {
            expand<kGroup>(unpacked, kElements, reinterpret_cast<char*>(values));
            narrow(values, kElements, out, run.dtype);
        }
    }
}

constexpr Dequantize kDequantize{
    dequantize_blocks<unpack_q4_0, 18, 32, 32>,   dequantize_blocks<unpack_q4_1, 20, 32, 32>,
    dequantize_blocks<unpack_q5_0, 22, 32, 32>,   dequantize_blocks<unpack_q5_1, 24, 32, 32>,
    dequantize_blocks<unpack_q8_0, 34, 32, 32>,   dequantize_blocks<unpack_q2_k, 84, 256, 16>,
    dequantize_blocks<unpack_q3_k, 110, 256, 16>, dequantize_blocks<unpack_q4_k, 144, 256, 32>,
    dequantize_blocks<unpack_q5_k, 176, 256, 32>, dequantize_blocks<unpack_q6_k, 210, 256, 16>,
    dequantize_blocks<unpack_iq4_nl, 18, 32, 32>,
};

}  // namespace
}  // namespace entrenar::gguf
