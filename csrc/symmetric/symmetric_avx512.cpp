// Symmetric integers, 16 lanes; the rest of a block under a mask.
#include <cstring>

#include "common/avx512.h"
#include "symmetric/dot.h"
#include "symmetric/symmetric.h"

namespace entrenar {
namespace {

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xFFFFu); }

// Codes of 16 lanes; a scale of 0 (or NaN) gives zeros.
inline __m512i codes_of(__m512 values, __m512 scale, __m512 limit, __mmask16 usable) {
    const __m512 scaled = _mm512_maskz_div_ps(usable, values, scale);
    const __m512 low = _mm512_max_ps(scaled, _mm512_sub_ps(_mm512_setzero_ps(), limit));
    return _mm512_cvtps_epi32(_mm512_min_ps(low, limit));
}

// `count` ≤ 16 codes, as bytes or as nibbles with the even one high.
template <int kLimit>
inline void store_codes(uint8_t* codes, __m512i values, int64_t count) {
    __m128i bytes = _mm512_cvtepi32_epi8(values);
    if constexpr (kLimit == 127) {
        _mm_mask_storeu_epi8(codes, first(count), bytes);
    } else {
        bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));
        _mm_mask_storeu_epi8(codes, first((count + 1) / 2), _mm_packus_epi16(pairs, pairs));
    }
}

template <int kDtype, int kLimit>
void quantize_block(const char* in, int64_t size, uint8_t* codes, char* scales) {
    constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;
    const int64_t whole = size / 16 * 16, rest = size - whole;
    __m512i largest = magnitude_bits(load_up_to_16<kDtype>(in + whole * kBytes, rest));
    for (int64_t i = 0; i < whole; i += 16) {
        largest = _mm512_max_epu32(largest, magnitude_bits(load16<kDtype>(in + i * kBytes)));
    }
    const float scale = bits_float(_mm512_reduce_max_epu32(largest)) / kLimit;
    std::memcpy(scales, &scale, 4);
    const __mmask16 usable = scale > 0 ? 0xFFFF : 0;
    const __m512 scale16 = _mm512_set1_ps(scale), limit = _mm512_set1_ps(kLimit);
    constexpr int64_t kPerByte = kLimit == 127 ? 1 : 2;
    for (int64_t i = 0; i < whole; i += 16) {
        const __m512i values = codes_of(load16<kDtype>(in + i * kBytes), scale16, limit, usable);
        store_codes<kLimit>(codes + i / kPerByte, values, 16);
    }
    const __m512i values = codes_of(load_up_to_16<kDtype>(in + whole * kBytes, rest), scale16, limit, usable);
    store_codes<kLimit>(codes + whole / kPerByte, values, rest);
}

template <int kDtype, int kLimit>
void quantize_blocks(const char* in, int64_t block_size, int64_t count, uint8_t* codes, char* scales) {
    for (; count > 0; scales += 4) {
        const int64_t size = count < block_size ? count : block_size;
        quantize_block<kDtype, kLimit>(in, size, codes, scales);
        in += size * (kDtype == kFloat32 ? 4 : 2);
        codes += kLimit == 127 ? size : size / 2;
        count -= size;
    }
}

template <int kLimit>
void quantize_dtype(const void* in, int dtype, int64_t block_size, int64_t count, uint8_t* codes, void* scales) {
    const auto chosen = dtype == kFloat32   ? quantize_blocks<kFloat32, kLimit>
                        : dtype == kFloat16 ? quantize_blocks<kFloat16, kLimit>
                                            : quantize_blocks<kBfloat16, kLimit>;
    chosen(static_cast<const char*>(in), block_size, count, codes, static_cast<char*>(scales));
}

void quantize(const void* in, int dtype, int limit, int64_t block_size, int64_t count, uint8_t* codes, void* scales) {
    const auto chosen = limit == 7 ? quantize_dtype<7> : quantize_dtype<127>;
    chosen(in, dtype, block_size, count, codes, scales);
}

template <int kDtype>
inline void store_values(char* out, __m512 values, __mmask16 mask) {
    if constexpr (kDtype == kFloat32) _mm512_mask_storeu_ps(out, mask, values);
    if constexpr (kDtype != kFloat32) _mm256_mask_storeu_epi16(out, mask, round16<kDtype>(values));
}

template <int kDtype>
void dequantize_blocks(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end,
                       char* out) {
    constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;
    for (; begin < end; ++scales) {
        const int64_t left = block_size - begin % block_size;
        const int64_t stop = end - begin < left ? end : begin + left;
        const __m512 scale = _mm512_set1_ps(*scales);
        for (; begin < stop; begin += 16, out += 16 * kBytes) {
            const __mmask16 mask = first(stop - begin);
            const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes + begin));
            store_values<kDtype>(out, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale), mask);
        }
        out -= (begin - stop) * kBytes;
        begin = stop;
    }
}

void dequantize(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end, void* out,
                int dtype) {
    const auto chosen = dtype == kFloat32   ? dequantize_blocks<kFloat32>
                        : dtype == kFloat16 ? dequantize_blocks<kFloat16>
                                            : dequantize_blocks<kBfloat16>;
    chosen(codes, scales, block_size, begin, end, static_cast<char*>(out));
}

}  // namespace

const Symmetric symmetric_avx512 = {quantize, dequantize, dot_int8};

}  // namespace entrenar
