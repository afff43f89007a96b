// Codebook dequantization in portable C++: sixteen products a block, rounded once, then a lookup for each code.
#include "codebook4/dequantize.h"
#include "common/floats.h"

namespace entrenar {
namespace {

template <class Value>
void lookup(const uint8_t* packed, const Value* values, int64_t begin, int64_t end, char* out) {
    for (int64_t i = begin; i < end; ++i, out += sizeof(Value)) {
        const uint8_t byte = packed[i / 2];
        std::memcpy(out, values + (i % 2 ? byte & 15 : byte >> 4), sizeof(Value));
    }
}

template <class Value>
void dequantize(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
                int64_t end, char* out, int dtype) {
    while (begin < end) {
        int64_t stop = (begin / block_size + 1) * block_size;
        if (stop > end) stop = end;
        Value values[16];
        for (int code = 0; code < 16; ++code) store_element(values, dtype, code, codebook[code] * *scales);
        lookup(packed, values, begin, stop, out);
        out += (stop - begin) * static_cast<int64_t>(sizeof(Value));
        begin = stop;
        ++scales;
    }
}

void range(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
           int64_t end, void* out, int dtype, bool) {
    auto* to = static_cast<char*>(out);
    if (dtype == kFloat32) return dequantize<float>(packed, scales, codebook, block_size, begin, end, to, dtype);
    dequantize<uint16_t>(packed, scales, codebook, block_size, begin, end, to, dtype);
}

}  // namespace

const DequantizeCodebook dequantize_codebook_generic = {range};

}  // namespace entrenar
