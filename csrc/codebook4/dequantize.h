// 4-bit codes → codebook[code] · scale of the block, for any range of a flat tensor.
#pragma once

#include <cstdint>

#include "scales/scales.h"

namespace entrenar {

struct DequantizeCodebook {
    // Elements [begin, end) of the tensor whose codes start at `packed`, into out[0 …]. scales[0] is the scale of the
    // block that holds element `begin`. stream: write past the cache where `out` is aligned for it.
    void (*range)(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
                  int64_t end, void* out, int dtype, bool stream);
};

extern const DequantizeCodebook dequantize_codebook_generic, dequantize_codebook_avx2, dequantize_codebook_avx512,
    dequantize_codebook_neon;

// The table of the path in use.
const DequantizeCodebook& dequantize_codebook_kernel();

// A whole weight; what the dequantization and the linear layer read.
struct CodebookWeight {
    const uint8_t* packed;
    ScaleBuffers scales;
    float codebook[16];
    int64_t block_size, count;
};

// Fill `weight` from a caller's buffers, or say which one is wrong.
int read_codebook_weight(const void* packed, int64_t packed_bytes, const ScaleBuffers& scales, const void* codebook,
                         int64_t codebook_bytes, int64_t block_size, int64_t count, CodebookWeight* weight);

// Elements [begin, end) into out, whichever way the scales are held.
void decode(const DequantizeCodebook& kernel, const CodebookWeight& weight, int64_t begin, int64_t end, void* out,
            int dtype, bool stream);

}  // namespace entrenar
