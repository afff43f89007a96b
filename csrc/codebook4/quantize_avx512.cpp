// Codebook quantization, 16 lanes. Where the codebook allows (nf4) the entry is found by its bucket and one comparison,
// 64 elements at a time; else a search over the 15 midpoints is four compares and three lookups within a register.
#include <cstring>

#include "codebook4/midpoints_avx512.h"
#include "codebook4/quantize.h"
#include "common/avx512.h"

namespace entrenar {
namespace {

template <int kDtype>
constexpr int64_t kBytes16 = 16 * (kDtype == kFloat32 ? 4 : 2);

// The bucket tables of quantize.h in registers, and the two byte orders in which 64 codes become 32 bytes.
struct Buckets {
    __m512 low, high;
    __m512i codes;

    explicit Buckets(const Nearest& nearest)
        : low(_mm512_loadu_ps(nearest.threshold)),
          high(_mm512_loadu_ps(nearest.threshold + 16)),
          codes(_mm512_loadu_si512(nearest.codes)) {}

    // 2 · bucket + (x > threshold) of each lane.
    __m512i index(__m512 scaled) const {
        const __m512 place = _mm512_fmadd_ps(scaled, _mm512_set1_ps(kBucketsPerUnit), _mm512_set1_ps(kBucketCentre));
        const __m512i bucket = _mm512_cvttps_epi32(place);
        const __mmask16 above = _mm512_cmp_ps_mask(scaled, _mm512_permutex2var_ps(low, bucket, high), _CMP_GT_OQ);
        const __m512i twice = _mm512_add_epi32(bucket, bucket);
        return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
    }

    // 64 elements → 32 bytes. Byte k of a lane belongs to the k-th vector of 16.
    template <int kDtype>
    __m256i quantize64(const char* in, __m512 reciprocal) const {
        __m512i at = index(_mm512_mul_ps(load16<kDtype>(in), reciprocal));
        for (int k = 1; k < 4; ++k) {
            const __m512i next = index(_mm512_mul_ps(load16<kDtype>(in + k * kBytes16<kDtype>), reciprocal));
            at = _mm512_or_si512(at, _mm512_slli_epi32(next, 8 * k));
        }
        const __m512i nibbles = _mm512_permutexvar_epi8(in_order(), _mm512_permutexvar_epi8(at, codes));
        return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(nibbles, _mm512_set1_epi16(0x0110)));
    }

    // Byte 16k + j of the result comes from byte k of lane j.
    static __m512i in_order() {
        const __m512i lanes = _mm512_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11,
                                              10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5,
                                              4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i bytes = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0202020202020202,
                                               0x0202020202020202, 0x0101010101010101, 0x0101010101010101, 0, 0);
        return _mm512_add_epi8(_mm512_slli_epi16(lanes, 2), bytes);  // lanes ≤ 15: nothing crosses a byte
    }
};

template <int kDtype>
void quantize_blocks(const char* in, const Nearest& nearest, int64_t block_size, int64_t blocks, uint8_t* codes,
                     char* absmax) {
    constexpr int64_t kStride = kBytes16<kDtype>;
    const Search search = load_search(nearest.midpoints, nearest.order);
    const Buckets buckets(nearest);
    const bool bucketed = nearest.bucketed && block_size % 64 == 0;
    const int64_t vectors = block_size / 16;
    for (int64_t b = 0; b < blocks; ++b, absmax += 4) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t v = 0; v < vectors; ++v) {
            largest = _mm512_max_epu32(largest, magnitude_bits(load16<kDtype>(in + v * kStride)));
        }
        const float scale = bits_float(_mm512_reduce_max_epu32(largest));
        std::memcpy(absmax, &scale, 4);
        const __m512 reciprocal = _mm512_set1_ps(1.0f / (scale < kTiny ? kTiny : scale));
        if (bucketed && scale <= 3.4028234663852886e38f) {
            for (int64_t v = 0; v < vectors; v += 4, in += 4 * kStride, codes += 32) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), buckets.quantize64<kDtype>(in, reciprocal));
            }
            continue;
        }
        for (int64_t v = 0; v < vectors; ++v, in += kStride, codes += 8) {
            const __m512i at = positions(search, _mm512_mul_ps(load16<kDtype>(in), reciprocal));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), pack(search, at));
        }
    }
}

void quantize(const void* in, int dtype, const Nearest& nearest, int64_t block_size, int64_t blocks, uint8_t* codes,
              void* absmax) {
    const auto* from = static_cast<const char*>(in);
    auto* to = static_cast<char*>(absmax);
    if (dtype == kFloat32) return quantize_blocks<kFloat32>(from, nearest, block_size, blocks, codes, to);
    if (dtype == kFloat16) return quantize_blocks<kFloat16>(from, nearest, block_size, blocks, codes, to);
    return quantize_blocks<kBfloat16>(from, nearest, block_size, blocks, codes, to);
}

}  // namespace

const QuantizeCodebook quantize_codebook_avx512 = {quantize};

}  // namespace entrenar
