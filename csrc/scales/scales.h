// Block scales: plain float32, or held in 8 bits with one float32 per 256 of them (double quantization).
#pragma once

#include <cstdint>

namespace entrenar {

constexpr int64_t kScaleGroup = 256;  // quant/scales.py's GROUP

// Buffers as the caller gives them; pointers may be unaligned. group null: `values` are float32. map null: `linear`.
struct ScaleBuffers {
    const void* values;
    int64_t values_bytes;
    const void* group;
    int64_t group_bytes;
    const void* offset;
    int64_t offset_bytes;
    const void* map;
    int64_t map_bytes;
};

// Error unless the buffers hold the scales of `blocks` blocks.
int check_scales(const ScaleBuffers& scales, int64_t blocks);

// The float32 scales of blocks [first, first + count) into out.
void decode_scales(const ScaleBuffers& scales, int64_t first, int64_t count, float* out);

}  // namespace entrenar
