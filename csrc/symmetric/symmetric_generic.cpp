// Symmetric integers in portable C++.
#include <cmath>

#include "common/floats.h"
#include "symmetric/dot.h"
#include "symmetric/symmetric.h"

namespace entrenar {
namespace {

float absmax_of(const void* in, int dtype, int64_t begin, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t magnitude = float_bits(load_element(in, dtype, i)) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    return bits_float(largest);
}

int code_of(float value, float scale, float limit) {
    if (!(scale > 0)) return 0;
    const float scaled = value / scale;
    if (scaled != scaled) return 0;  // only with a scale that is not finite, which the caller reports
    return static_cast<int>(std::nearbyint(scaled < -limit ? -limit : scaled > limit ? limit : scaled));
}

void quantize(const void* in, int dtype, int limit, int64_t block_size, int64_t count, uint8_t* codes, void* scales) {
    const auto bound = static_cast<float>(limit);
    for (int64_t begin = 0, block = 0; begin < count; begin += block_size, ++block) {
        const int64_t end = count - begin < block_size ? count : begin + block_size;
        const float scale = absmax_of(in, dtype, begin, end) / bound;
        store_element(scales, kFloat32, block, scale);
        for (int64_t i = begin; i < end; ++i) {
            const int code = code_of(load_element(in, dtype, i), scale, bound);
            if (limit == 127) {
                codes[i] = static_cast<uint8_t>(code);
            } else if (i % 2 == 0) {
                codes[i / 2] = static_cast<uint8_t>((code & 15) << 4);
            } else {
                codes[i / 2] |= static_cast<uint8_t>(code & 15);
            }
        }
    }
}

void dequantize(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end, void* out,
                int dtype) {
    const int64_t first = begin / block_size;
    for (int64_t i = begin; i < end; ++i) {
        store_element(out, dtype, i - begin, static_cast<float>(codes[i]) * scales[i / block_size - first]);
    }
}

}  // namespace

const Symmetric symmetric_generic = {quantize, dequantize, dot_int8};

}  // namespace entrenar
