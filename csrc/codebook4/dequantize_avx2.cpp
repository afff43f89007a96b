// Codebook dequantization with AVX2: the block's sixteen products, rounded once, are a byte-shuffle table (16-bit
// floats: one shuffle for the low bytes, one for the high) or two permute tables (float32).
#include "codebook4/dequantize.h"
#include "common/avx2.h"

namespace entrenar {
namespace {

// The codes of 8 bytes, 16 elements in order, one a byte.
inline __m128i codes_of(const uint8_t* packed) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm_unpacklo_epi8(high, low);
}

inline void store(char* out, __m256i values, bool stream) {
    if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(out), values);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), values);
}

template <int kDtype>
struct Lookup {
    static constexpr int64_t kBytes = 2;
    __m128i low, high;  // the low and the high byte of each of the sixteen values

    Lookup(const float* codebook, float scale) {
        const __m256 scales = _mm256_set1_ps(scale);
        const __m128i first = round8<kDtype>(_mm256_mul_ps(_mm256_loadu_ps(codebook), scales));
        const __m128i second = round8<kDtype>(_mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scales));
        const __m128i mask = _mm_set1_epi16(0xFF);
        low = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
        high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    }

    void write16(const uint8_t* packed, char* out, bool stream) const {
        const __m128i codes = codes_of(packed);
        const __m128i lows = _mm_shuffle_epi8(low, codes), highs = _mm_shuffle_epi8(high, codes);
        store(out, _mm256_set_m128i(_mm_unpackhi_epi8(lows, highs), _mm_unpacklo_epi8(lows, highs)), stream);
    }
};

template <>
struct Lookup<kFloat32> {
    static constexpr int64_t kBytes = 4;
    __m256 low, high;  // values of the codes 0 … 7 and 8 … 15

    Lookup(const float* codebook, float scale) {
        low = _mm256_mul_ps(_mm256_loadu_ps(codebook), _mm256_set1_ps(scale));
        high = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), _mm256_set1_ps(scale));
    }

    __m256i eight(__m128i codes) const {
        const __m256i index = _mm256_cvtepu8_epi32(codes);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
        return _mm256_castps_si256(
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper));
    }

    void write16(const uint8_t* packed, char* out, bool stream) const {
        const __m128i codes = codes_of(packed);
        store(out, eight(codes), stream);
        store(out + 32, eight(_mm_srli_si128(codes, 8)), stream);
    }
};

// Elements [begin, end) of one block, one at a time.
template <int kDtype>
void write_singly(const uint8_t* packed, const float* codebook, float scale, int64_t begin, int64_t end, char* out) {
    for (int64_t i = begin; i < end; ++i) {
        const uint8_t byte = packed[i / 2];
        store_element(out, kDtype, i - begin, codebook[i % 2 ? byte & 15 : byte >> 4] * scale);
    }
}

template <int kDtype>
void dequantize(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
                int64_t end, void* out, bool stream) {
    constexpr int64_t kBytes = Lookup<kDtype>::kBytes;
    auto* to = static_cast<char*>(out);
    stream = stream && reinterpret_cast<uintptr_t>(out) % 32 == 0 && begin % 16 == 0 && block_size % 16 == 0;
    int64_t block_end = (begin / block_size + 1) * block_size;
    for (; begin < end; block_end += block_size, ++scales) {
        const int64_t stop = block_end < end ? block_end : end;
        const Lookup<kDtype> lookup(codebook, *scales);
        if (begin % 2 != 0) {  // a row of odd length: its first element is a low nibble
            write_singly<kDtype>(packed, codebook, *scales, begin, begin + 1, to);
            to += kBytes;
            ++begin;
        }
        for (; stop - begin >= 16; begin += 16, to += 16 * kBytes) lookup.write16(packed + begin / 2, to, stream);
        write_singly<kDtype>(packed, codebook, *scales, begin, stop, to);
        to += (stop - begin) * kBytes;
        begin = stop;
    }
    if (stream) _mm_sfence();
}

void range(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
           int64_t end, void* out, int dtype, bool stream) {
    const auto chosen = dtype == kFloat32   ? dequantize<kFloat32>
                        : dtype == kFloat16 ? dequantize<kFloat16>
                                            : dequantize<kBfloat16>;
    chosen(packed, scales, codebook, block_size, begin, end, out, stream);
}

}  // namespace

const DequantizeCodebook dequantize_codebook_avx2 = {range};

}  // namespace entrenar
