// Blocks of 6 × 64 with AVX512-BF16, and the packing and storing that the AMX kernel shares.
#include <immintrin.h>

#include "common/transpose_avx512.h"
#include "matmul/matmul.h"

namespace entrenar {
namespace {

constexpr int kRows = 6, kGroups = 2;

inline __m512bh pairs(const uint16_t* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }

inline __m512bh broadcast(const char* from) {
    int pair;
    __builtin_memcpy(&pair, from, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// kTokens rows of A against kWide strips.
template <int kTokens, int kWide>
void multiply(const Run* runs, int64_t count, int64_t offset, int64_t group_elements, float* c, int64_t pitch,
              bool add) {
    __m512 sums[kTokens][kWide];
    for (int t = 0; t < kTokens; ++t) {
        for (int s = 0; s < kWide; ++s) {
            sums[t][s] = add ? _mm512_loadu_ps(c + t * pitch + s * kStrip) : _mm512_setzero_ps();
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const Run& run = runs[i];
        for (int64_t step = 0; step < run.steps; ++step) {
            const uint16_t* b = run.b + offset + step * kStepElements;
            const char* a = run.a + step * 64;
            for (int pair = 0; pair < 16; ++pair, b += 32, a += 4) {
                __m512bh strip[kWide];
                for (int s = 0; s < kWide; ++s)
                    strip[s] = pairs(b + (s / 2) * group_elements + (s % 2) * kStepElements / 2);
                for (int t = 0; t < kTokens; ++t) {
                    const __m512bh token = broadcast(a + t * run.a_stride);
                    for (int s = 0; s < kWide; ++s) sums[t][s] = _mm512_dpbf16_ps(sums[t][s], token, strip[s]);
                }
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int s = 0; s < kWide; ++s) _mm512_storeu_ps(c + t * pitch + s * kStrip, sums[t][s]);
    }
}

template <int kTokens>
void choose(const Run* runs, int64_t count, int64_t strips, int64_t offset, int64_t group_elements, float* c,
            int64_t pitch, bool add) {
    constexpr decltype(&multiply<kTokens, 1>) by_strips[4] = {multiply<kTokens, 1>, multiply<kTokens, 2>,
                                                              multiply<kTokens, 3>, multiply<kTokens, 4>};
    by_strips[strips - 1](runs, count, offset, group_elements, c, pitch, add);
}

void block(const Run* runs, int64_t count, int64_t rows, int64_t strips, int64_t offset, int64_t group_elements,
           float* c, int64_t pitch, bool add) {
    constexpr decltype(&choose<1>) by_rows[kRows] = {choose<1>, choose<2>, choose<3>, choose<4>, choose<5>, choose<6>};
    by_rows[rows - 1](runs, count, strips, offset, group_elements, c, pitch, add);
}

void nothing() {}

}  // namespace

void pack_transposed_avx512bf16(const uint16_t* rows, int64_t stride, uint16_t* strip) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + i * stride);
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(strip + i * 32, r[i]);
}

void pack_pairs_avx512bf16(const uint16_t* first, const uint16_t* second, int64_t groups, int64_t group_elements,
                           uint16_t* pair) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (int64_t group = 0; group < groups; ++group, pair += group_elements) {
        const __m512i one = _mm512_loadu_si512(first + group * kGroup),
                      two = _mm512_loadu_si512(second + group * kGroup);
        _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(one, lower, two));
        _mm512_storeu_si512(pair + kStepElements / 2, _mm512_permutex2var_epi16(one, upper, two));
    }
}

namespace {

inline __m512 widened(const uint16_t* from, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace

void store_bf16_avx512bf16(const Bf16Block& to, const float* c, int64_t pitch, float alpha) {
    const __m512 factor = _mm512_set1_ps(alpha);
    for (int64_t row = 0; row < to.rows; ++row, c += pitch) {
        const int64_t at = row * to.stride;
        for (int64_t i = 0; i < to.columns; i += 32) {
            const int64_t there = to.columns - i;
            const auto mask = static_cast<__mmask32>(there < 32 ? (1u << there) - 1 : ~0u);
            __m512 values[2];
            for (int half = 0; half < 2; ++half) {
                const auto lanes = static_cast<__mmask16>(mask >> 16 * half);
                const int64_t from = i + 16 * half;
                values[half] = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, c + from), factor);
                if (to.bias != nullptr) values[half] = _mm512_add_ps(values[half], widened(to.bias + from, lanes));
                if (to.residual != nullptr)
                    values[half] = _mm512_add_ps(values[half], widened(to.residual + at + from, lanes));
            }
            const __m512bh rounded = _mm512_cvtne2ps_pbh(values[1], values[0]);
            _mm512_mask_storeu_epi16(to.out + at + i, mask, reinterpret_cast<__m512i>(rounded));
        }
    }
}

const MatmulKernel matmul_avx512bf16 = {
    kRows, kGroups, block, nothing, nothing, pack_transposed_avx512bf16, pack_pairs_avx512bf16, store_bf16_avx512bf16};

}  // namespace entrenar
