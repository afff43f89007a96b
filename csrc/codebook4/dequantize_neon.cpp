// Codebook dequantization with NEON, 16-bit floats by byte lookup as in the AVX2 file; float32 by the same on words.
// Compiled on aarch64 only, and not yet run by anyone: ours have no such machine.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "codebook4/dequantize.h"
#include "common/floats.h"

namespace entrenar {
namespace {

// The codes of 8 bytes, 16 elements in order, one a byte.
inline uint8x16_t codes_of(const uint8_t* packed) {
    const uint8x8_t bytes = vld1_u8(packed);
    const uint8x8x2_t pair = vzip_u8(vshr_n_u8(bytes, 4), vand_u8(bytes, vdup_n_u8(15)));
    return vcombine_u8(pair.val[0], pair.val[1]);
}

// kBytes planes of the sixteen rounded products: plane p holds byte p of each.
template <int kBytes>
struct Lookup {
    uint8x16_t planes[kBytes];

    Lookup(const float* codebook, float scale, int dtype) {
        uint8_t values[16 * kBytes], plane[16];
        for (int code = 0; code < 16; ++code) store_element(values, dtype, code, codebook[code] * scale);
        for (int p = 0; p < kBytes; ++p) {
            for (int code = 0; code < 16; ++code) plane[code] = values[code * kBytes + p];
            planes[p] = vld1q_u8(plane);
        }
    }

    void write16(const uint8_t* packed, uint8_t* out) const {
        const uint8x16_t codes = codes_of(packed);
        if constexpr (kBytes == 2) {
            vst2q_u8(out, uint8x16x2_t{{vqtbl1q_u8(planes[0], codes), vqtbl1q_u8(planes[1], codes)}});
        } else {
            vst4q_u8(out, uint8x16x4_t{{vqtbl1q_u8(planes[0], codes), vqtbl1q_u8(planes[1], codes),
                                        vqtbl1q_u8(planes[2], codes), vqtbl1q_u8(planes[3], codes)}});
        }
    }
};

template <int kBytes>
void dequantize(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
                int64_t end, uint8_t* out, int dtype) {
    const auto singly = [&](int64_t stop, float scale) {
        for (; begin < stop; ++begin, out += kBytes) {
            const uint8_t byte = packed[begin / 2];
            store_element(out, dtype, 0, codebook[begin % 2 ? byte & 15 : byte >> 4] * scale);
        }
    };
    for (; begin < end; ++scales) {
        int64_t stop = (begin / block_size + 1) * block_size;
        if (stop > end) stop = end;
        const Lookup<kBytes> lookup(codebook, *scales, dtype);
        if (begin % 2 != 0) singly(begin + 1, *scales);
        for (; stop - begin >= 16; begin += 16, out += 16 * kBytes) lookup.write16(packed + begin / 2, out);
        singly(stop, *scales);
    }
}

void range(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
           int64_t end, void* out, int dtype, bool) {
    auto* to = static_cast<uint8_t*>(out);
    if (dtype == kFloat32) return dequantize<4>(packed, scales, codebook, block_size, begin, end, to, dtype);
    dequantize<2>(packed, scales, codebook, block_size, begin, end, to, dtype);
}

}  // namespace

const DequantizeCodebook dequantize_codebook_neon = {range};

}  // namespace entrenar
#endif
