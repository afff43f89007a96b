// Codebook quantization in portable C++: one element at a time, a search of four steps without branches.
#include "codebook4/quantize.h"
#include "common/floats.h"

namespace entrenar {
namespace {

uint8_t nearest_code(const Nearest& nearest, float value) {
    int below = 0;
    for (int step = 8; step; step /= 2) below += nearest.midpoints[below + step - 1] >= value ? 0 : step;
    return nearest.order[below];
}

void quantize_block(const void* in, int dtype, const Nearest& nearest, int64_t first, int64_t size, uint8_t* codes,
                    void* absmax) {
    uint32_t largest = 0;
    for (int64_t i = first; i < first + size; ++i) {
        const uint32_t magnitude = float_bits(load_element(in, dtype, i)) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    const float scale = bits_float(largest);
    store_element(absmax, kFloat32, 0, scale);
    const float reciprocal = 1.0f / (scale < kTiny ? kTiny : scale);
    for (int64_t i = 0; i < size; i += 2) {
        const uint8_t even = nearest_code(nearest, load_element(in, dtype, first + i) * reciprocal);
        const uint8_t odd = nearest_code(nearest, load_element(in, dtype, first + i + 1) * reciprocal);
        codes[i / 2] = static_cast<uint8_t>(even << 4 | odd);
    }
}

void quantize_blocks(const void* in, int dtype, const Nearest& nearest, int64_t block_size, int64_t blocks,
                     uint8_t* codes, void* absmax) {
    for (int64_t b = 0; b < blocks; ++b) {
        quantize_block(in, dtype, nearest, b * block_size, block_size, codes + b * block_size / 2,
                       static_cast<char*>(absmax) + b * 4);
    }
}

}  // namespace

const QuantizeCodebook quantize_codebook_generic = {quantize_blocks};

}  // namespace entrenar
