// The row-wise parts of attention, 16 lanes of float32.
#include <immintrin.h>

#include "attention/attention.h"
#include "common/exp.h"
#include "common/lanes.h"

namespace entrenar {
namespace {

inline __m512i lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// Lanes whose column, counted from `column`, lies in [first, last).
inline __mmask16 inside(int64_t column, int64_t first, int64_t last) {
    const auto mask_below = [column](int64_t bound) {
        const int64_t count = bound - column;
        return count <= 0 ? 0u : count >= 16 ? 0xFFFFu : (1u << count) - 1;
    };
    return static_cast<__mmask16>(mask_below(last) & ~mask_below(first));
}

inline void store_bf16(uint16_t* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512 load_bf16(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// body(column, lanes that count) over [first, last) in vectors of 16 from a whole vector on; the lanes are a constant but in
// the first and the last.
template <class Body>
inline void over_range(int64_t first, int64_t last, const Body& body) {
    if (first >= last) return;
    int64_t c = first / 16 * 16;
    const int64_t whole = last / 16 * 16;
    if (c < first || last - c < 16) {
        body(c, inside(c, first, last));
        c += 16;
    }
    for (; c < whole; c += 16) body(c, static_cast<__mmask16>(0xFFFF));
    if (c < last) body(c, inside(c, first, last));
}

inline void zero_outside(uint16_t* row, int64_t first, int64_t last, int64_t columns) {
    for (int64_t c = 0; c < first / 16 * 16; c += 16) store_bf16(row + c, _mm512_setzero_ps());
    for (int64_t c = first >= last ? first / 16 * 16 : (last + 15) / 16 * 16; c < columns; c += 16) {
        store_bf16(row + c, _mm512_setzero_ps());
    }
}

void softmax(const float* scores, int64_t first, int64_t last, int64_t columns, float scale, RowState* state, float* o,
             int64_t width, uint16_t* p) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 largest = lowest;
    over_range(first, last, [&](int64_t c, __mmask16 mask) {
        largest = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, mask, scores + c), largest);
    });
    const float before = state->maximum, maximum = _mm512_reduce_max_ps(largest) * scale;
    const float now = maximum > before ? maximum : before;
    const __m512 centre = _mm512_set1_ps(-now), factor = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    over_range(first, last, [&](int64_t c, __mmask16 mask) {
        const __m512 power = exp_below_overflow(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, scores + c), factor, centre));
        const __m512 kept = _mm512_maskz_mov_ps(mask, power);
        total = _mm512_add_ps(total, kept);
        store_bf16(p + c, kept);
    });
    zero_outside(p, first, last, columns);
    const float added = _mm512_reduce_add_ps(total);
    if (now == before || before == -__builtin_inff()) {
        state->sum = (before == -__builtin_inff() ? 0.0f : state->sum) + added;
    } else {
        const float shrink = exp(all(before - now))[0];
        state->sum = state->sum * shrink + added;
        for (int64_t d = 0; d < width; d += 16) {
            _mm512_storeu_ps(o + d, _mm512_mul_ps(_mm512_loadu_ps(o + d), _mm512_set1_ps(shrink)));
        }
    }
    state->maximum = now;
}

void finish(const float* o, float sum, int64_t width, uint16_t* out) {
    const __m512 reciprocal = _mm512_set1_ps(1.0f / sum);
    for (int64_t d = 0; d < width; d += 16) store_bf16(out + d, _mm512_mul_ps(_mm512_loadu_ps(o + d), reciprocal));
}

float dot(const uint16_t* a, const uint16_t* b, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 16) sum = _mm512_fmadd_ps(load_bf16(a + d), load_bf16(b + d), sum);
    return _mm512_reduce_add_ps(sum);
}

void gradient(const float* scores, const float* dp, const float* lse, const float* delta, int64_t first, int64_t last,
              int64_t columns, float scale, uint16_t* p, uint16_t* ds) {
    const __m512 factor = _mm512_set1_ps(scale);
    over_range(first, last, [&](int64_t c, __mmask16 mask) {
        const __m512 exponent = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, scores + c), factor,
                                                _mm512_maskz_loadu_ps(mask, lse + c));
        const __m512 power = _mm512_maskz_mov_ps(mask, exp_below_overflow(exponent));
        const __m512 off = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, dp + c), _mm512_maskz_loadu_ps(mask, delta + c));
        store_bf16(p + c, power);
        store_bf16(ds + c, _mm512_mul_ps(_mm512_mul_ps(power, off), factor));
    });
    zero_outside(p, first, last, columns);
    zero_outside(ds, first, last, columns);
}

void store_transposed(const float* c, int64_t pitch, int64_t count, int64_t width, uint16_t* out,
                                 int64_t stride) {
    const __m512i offsets = _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(pitch)));
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t d = 0; d < width; d += 16) {
            store_bf16(out + row * stride + d, _mm512_i32gather_ps(offsets, c + d * pitch + row, 4));
        }
    }
}

}  // namespace

const AttentionRows attention_avx512bf16 = {softmax, finish, dot, gradient, store_transposed};

}  // namespace entrenar
