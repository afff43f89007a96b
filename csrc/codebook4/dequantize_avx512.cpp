// Codebook dequantization with AVX-512: the block's sixteen products, rounded once, stay in a register as a lookup
// table, so that an element costs one permute and no arithmetic.
#include "codebook4/dequantize.h"
#include "common/avx512.h"

namespace entrenar {
namespace {

// One vector of a result: float32 takes 16 elements, the 16-bit floats 32.
template <int kDtype>
struct Lookup {
    static constexpr int64_t kLanes = kDtype == kFloat32 ? 16 : 32;
    static constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;
    __m512i table;

    Lookup(__m512 codebook, float scale) {
        const __m512 values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
        if constexpr (kDtype == kFloat32) table = _mm512_castps_si512(values);
        // Twice, because the index's fifth bit is not masked off below.
        if constexpr (kDtype == kFloat16) table = _mm512_broadcast_i64x4(round16<kDtype>(values));
        if constexpr (kDtype == kBfloat16) table = _mm512_permutexvar_epi16(high_halves(), rounded_bits(values));
    }

    // The upper 16 bits of each lane, twice.
    static __m512i high_halves() {
        const __m512i odd = _mm512_set1_epi32(0x00010001);
        const __m512i lanes =
            _mm512_set_epi32(0x1E001C, 0x1A0018, 0x160014, 0x120010, 0xE000C, 0xA0008, 0x60004, 0x20000, 0x1E001C,
                             0x1A0018, 0x160014, 0x120010, 0xE000C, 0xA0008, 0x60004, 0x20000);
        return _mm512_or_si512(lanes, odd);
    }

    // 64 elements of a 16-bit float from 32 bytes, in two vectors.
    void pair(__m256i bytes, __m512i* first, __m512i* second) const {
        // Bytes 4l … 4l+3 and 16+4l … into lane l, so that the unpacks within lanes give the elements in order.
        const __m256i spread = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m512i wide = _mm512_cvtepu8_epi16(spread);
        const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table);
        const __m512i odd = _mm512_permutexvar_epi16(wide, table);
        *first = _mm512_unpacklo_epi16(even, odd);
        *second = _mm512_unpackhi_epi16(even, odd);
    }

    // kLanes elements from the low kLanes / 2 bytes.
    __m512i operator()(__m128i bytes) const {
        if constexpr (kDtype == kFloat32) {
            const __m512i wide = _mm512_cvtepu8_epi64(bytes);
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
            return _mm512_permutexvar_epi32(index, table);
        } else {
            const __m512i wide = _mm512_cvtepu8_epi32(bytes);
            const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
            return _mm512_permutexvar_epi16(index, table);
        }
    }
};

inline __mmask32 first(int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }

// `count` elements, fewer than a vector, from an even element on.
template <int kDtype>
void lookup_rest(const Lookup<kDtype>& lookup, const uint8_t* packed, int64_t count, char* out) {
    const auto bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(first((count + 1) / 2)), packed);
    if constexpr (kDtype == kFloat32)
        _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(first(count)), lookup(bytes));
    if constexpr (kDtype != kFloat32) _mm512_mask_storeu_epi16(out, first(count), lookup(bytes));
}

template <bool kStream>
inline void store(char* out, __m512i values) {
    if constexpr (kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), values);
    if constexpr (!kStream) _mm512_storeu_si512(out, values);
}

template <int kDtype, bool kStream>
inline void lookup_block(const Lookup<kDtype>& lookup, const uint8_t* packed, int64_t count, char* out) {
    constexpr int64_t kLanes = Lookup<kDtype>::kLanes;
    if constexpr (kDtype != kFloat32) {
        for (; count >= 64; count -= 64, packed += 32, out += 128) {
            __m512i one, two;
            lookup.pair(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), &one, &two);
            store<kStream>(out, one);
            store<kStream>(out + 64, two);
        }
    }
    for (; count >= kLanes; count -= kLanes, packed += kLanes / 2, out += 64) {
        __m128i bytes;
        if constexpr (kDtype == kFloat32) bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
        if constexpr (kDtype != kFloat32) bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
        store<kStream>(out, lookup(bytes));
    }
    if (count > 0) lookup_rest(lookup, packed, count, out);
}

template <int kDtype, bool kStream>
void dequantize(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
                int64_t end, char* out) {
    const __m512 values = _mm512_loadu_ps(codebook);
    int64_t block_end = (begin / block_size + 1) * block_size;
    for (; begin < end; block_end += block_size, ++scales) {
        const int64_t stop = block_end < end ? block_end : end;
        const Lookup<kDtype> lookup(values, *scales);
        if (begin % 2 != 0) {  // a row of odd length: its first element is a low nibble
            store_element(out, kDtype, 0, codebook[packed[begin / 2] & 15] * *scales);
            out += Lookup<kDtype>::kBytes;
            ++begin;
        }
        lookup_block<kDtype, kStream>(lookup, packed + begin / 2, stop - begin, out);
        out += (stop - begin) * Lookup<kDtype>::kBytes;
        begin = stop;
    }
    if constexpr (kStream) _mm_sfence();
}

template <int kDtype>
void choose(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
            int64_t end, void* out, bool stream) {
    auto* to = static_cast<char*>(out);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && begin % 32 == 0 && block_size % 32 == 0;
    if (stream && aligned) return dequantize<kDtype, true>(packed, scales, codebook, block_size, begin, end, to);
    dequantize<kDtype, false>(packed, scales, codebook, block_size, begin, end, to);
}

void range(const uint8_t* packed, const float* scales, const float* codebook, int64_t block_size, int64_t begin,
           int64_t end, void* out, int dtype, bool stream) {
    const auto chosen = dtype == kFloat32 ? choose<kFloat32> : dtype == kFloat16 ? choose<kFloat16> : choose<kBfloat16>;
    chosen(packed, scales, codebook, block_size, begin, end, out, stream);
}

}  // namespace

const DequantizeCodebook dequantize_codebook_avx512 = {range};

}  // namespace entrenar
