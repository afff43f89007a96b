// Symmetric integers, 16 elements a step in two registers; the rest of a block goes through a padded copy.
#include <cstring>

#include "common/avx2.h"
#include "symmetric/dot.h"
#include "symmetric/symmetric.h"

namespace entrenar {
namespace {

// Codes of 8 lanes; a scale of 0 (or NaN) gives zeros.
inline __m256i codes_of(__m256 values, __m256 scale, __m256 limit) {
    const __m256 usable = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 scaled = _mm256_and_ps(_mm256_div_ps(values, scale), usable);
    const __m256 low = _mm256_max_ps(scaled, _mm256_sub_ps(_mm256_setzero_ps(), limit));
    return _mm256_cvtps_epi32(_mm256_min_ps(low, limit));
}

// 16 codes, as 16 bytes or as 8 with the even one in the high nibble.
template <int kLimit>
inline void store_codes(uint8_t* codes, __m256i first, __m256i second) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if constexpr (kLimit == 127) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
    } else {
        const __m128i nibbles = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x0110));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(pairs, pairs));
    }
}

template <int kDtype, int kLimit>
inline void quantize16(const char* in, __m256 scale, uint8_t* codes) {
    const __m256 limit = _mm256_set1_ps(kLimit);
    const __m256i first = codes_of(load8<kDtype>(in), scale, limit);
    store_codes<kLimit>(codes, first, codes_of(load8<kDtype>(in + 8 * (kDtype == kFloat32 ? 4 : 2)), scale, limit));
}

template <int kDtype, int kLimit>
void quantize_block(const char* in, int64_t size, uint8_t* codes, char* scales) {
    constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2, kPerByte = kLimit == 127 ? 1 : 2;
    const int64_t whole = size / 16 * 16, rest = size - whole;
    char padded[16 * kBytes] = {};
    std::memcpy(padded, in + whole * kBytes, static_cast<size_t>(rest * kBytes));
    __m256i largest =
        _mm256_max_epu32(magnitude_bits(load8<kDtype>(padded)), magnitude_bits(load8<kDtype>(padded + 8 * kBytes)));
    for (int64_t i = 0; i < whole; i += 8) {
        largest = _mm256_max_epu32(largest, magnitude_bits(load8<kDtype>(in + i * kBytes)));
    }
    const float scale = bits_float(largest_lane(largest)) / kLimit;
    std::memcpy(scales, &scale, 4);
    const __m256 scale8 = _mm256_set1_ps(scale);
    for (int64_t i = 0; i < whole; i += 16) quantize16<kDtype, kLimit>(in + i * kBytes, scale8, codes + i / kPerByte);
    uint8_t last[16];
    quantize16<kDtype, kLimit>(padded, scale8, last);
    std::memcpy(codes + whole / kPerByte, last, static_cast<size_t>((rest + kPerByte - 1) / kPerByte));
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
void dequantize_blocks(const int8_t* codes, const float* scales, int64_t block_size, int64_t begin, int64_t end,
                       char* out) {
    constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;
    for (; begin < end; ++scales) {
        const int64_t left = block_size - begin % block_size;
        const int64_t stop = end - begin < left ? end : begin + left;
        const __m256 scale = _mm256_set1_ps(*scales);
        for (; stop - begin >= 8; begin += 8, out += 8 * kBytes) {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + begin));
            store8<kDtype>(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), scale));
        }
        for (; begin < stop; ++begin, out += kBytes) {
            store_element(out, kDtype, 0, static_cast<float>(codes[begin]) * *scales);
        }
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

const Symmetric symmetric_avx2 = {quantize, dequantize, dot_int8};

}  // namespace entrenar
