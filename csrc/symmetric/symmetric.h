// Symmetric integers: scale = absmax / limit, code = round(clamp(w / scale, -limit, limit)); int8, or int4 in nibbles.
#pragma once

#include <cstdint>

#include "scales/scales.h"

namespace entrenar {

struct Symmetric {
    // Elements [0, count), which start a block; the last block may be partial. limit 7: two codes a byte, even element
    // in the high nibble, block_size even; limit 127: one code a byte. One float32 a block into scales.
    void (*quantize)(const void* in, int dtype, int limit, int64_t block_size, int64_t count, uint8_t* codes,
                     void* scales);
    // Elements [begin, end) of int8 codes: code · scale; scales[0] is the scale of the block that holds `begin`.
    void (*dequantize)(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end,
                       void* out, int dtype);
    // sums[t] += Σ code · scale · x over elements [begin, end), of which x[t · x_stride] meets the first; up to 4
    // tokens.
    void (*dot)(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end,
                const float* x, int64_t x_stride, int64_t tokens, float* sums);
};

extern const Symmetric symmetric_generic, symmetric_avx2, symmetric_avx512;

// The table of the path in use.
const Symmetric& symmetric_kernel();

// A whole int8 weight; what the dequantization and the product read.
struct Int8Weight {
    const int8_t* codes;
    ScaleBuffers scales;
    int64_t block_size;
};

// Fill `weight` from a caller's buffers, or say which one is wrong.
int read_int8(const void* codes, int64_t codes_bytes, const ScaleBuffers& scales, int64_t block_size, int64_t count,
              Int8Weight* weight);

// Elements [begin, end) into out, whichever way the scales are held.
void decode(const Symmetric& kernel, const Int8Weight& weight, int64_t begin, int64_t end, void* out, int dtype);

// sums[t] = Σ of elements [begin, end) times x[t · x_stride …], for up to 4 tokens.
void dot(const Symmetric& kernel, const Int8Weight& weight, int64_t begin, int64_t end, const float* x,
         int64_t x_stride, int64_t tokens, float* sums);

}  // namespace entrenar
