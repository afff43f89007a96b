// Block scales: plain float32, or held in 8 bits with one float32 per 256 of them (double quantization).
#pragma once

#include <cstdint>

#include "abi/abi.h"

namespace entrenar {

constexpr int64_t kScaleGroup = 256;  // quant/scales.py's GROUP

// Error unless the buffers hold the scales of `blocks` blocks.
int check_scales(const ScaleBuffers& scales, int64_t blocks);

// The float32 scales of blocks [first, first + count) into out.
void decode_scales(const ScaleBuffers& scales, int64_t first, int64_t count, float* out);

}  // namespace entrenar
