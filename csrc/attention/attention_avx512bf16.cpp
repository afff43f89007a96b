// The row-wise parts of attention, 16 lanes of float32.
#include <immintrin.h>

#include "attention/attention.h"
#include "common/exp.h"
#include "common/lanes.h"
#include "common/transpose_avx512.h"

namespace entrenar {
namespace {

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

// body(column, lanes that count) over [first, last) in vectors of 16 from a whole vector on; the lanes are a constant
// but in the first and the last.
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

// 2^x, for what is rounded to bfloat16 afterwards: 2^(the fraction of x) as a polynomial (minimax for the relative
// error, 3e-6, with 2^0 held at 1), and the instruction that multiplies by a power of two rounds its exponent down
// itself.
inline __m512 power_of_two(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power =
        _mm512_fmadd_ps(_mm512_set1_ps(0.013426687568426132f), fraction, _mm512_set1_ps(0.0522424690425396f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.2412802129983902f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.6930448412895203f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, x);
}

// The largest of row[first, last), −∞ if there is none; four chains, because each waits for its last maximum.
inline float largest(const float* row, int64_t first, int64_t last) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 most[4] = {lowest, lowest, lowest, lowest};
    int64_t c = first;
    for (; c + 64 <= last; c += 64) {
        for (int i = 0; i < 4; ++i) most[i] = _mm512_max_ps(_mm512_loadu_ps(row + c + 16 * i), most[i]);
    }
    for (int i = 0; c < last; c += 16, ++i) {
        most[i] = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, inside(c, c, last), row + c), most[i]);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
}

void softmax(const float* scores, int64_t first, int64_t last, int64_t columns, float scale, RowState* state, float* o,
             int64_t width, uint16_t* p) {
    const float before = state->maximum, maximum = largest(scores, first, last) * scale;
    const float now = maximum > before ? maximum : before;
    const __m512 centre = _mm512_set1_ps(-now * kLog2E), factor = _mm512_set1_ps(scale * kLog2E);
    __m512 total = _mm512_setzero_ps();
    over_range(first, last, [&](int64_t c, __mmask16 mask) {
        const __m512 power = power_of_two(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, scores + c), factor, centre));
        const __m512 weights = _mm512_maskz_mov_ps(mask, power);
        total = _mm512_add_ps(total, weights);
        store_bf16(p + c, weights);
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
    const __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(kLog2E), both = _mm512_set1_ps(scale * kLog2E);
    over_range(first, last, [&](int64_t c, __mmask16 mask) {
        const __m512 centre = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, lse + c), base);
        const __m512 exponent = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, scores + c), both, centre);
        const __m512 power = _mm512_maskz_mov_ps(mask, power_of_two(exponent));
        const __m512 off =
            _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, dp + c), factor, _mm512_maskz_loadu_ps(mask, delta + c));
        store_bf16(p + c, power);
        store_bf16(ds + c, _mm512_mul_ps(power, off));
    });
    zero_outside(p, first, last, columns);
    zero_outside(ds, first, last, columns);
}

void store_transposed(const float* c, int64_t pitch, int64_t count, int64_t width, uint16_t* out, int64_t stride) {
    for (int64_t row = 0; row < count; row += 16) {
        const int64_t rows = count - row < 16 ? count - row : 16;
        const __mmask16 there = inside(0, 0, rows);
        for (int64_t d = 0; d < width; d += 32) {
            __m512i halves[2][16];
            for (int half = 0; half < 2; ++half) {
                const float* from = c + (d + 16 * half) * pitch + row;
                for (int i = 0; i < 16; ++i) halves[half][i] = _mm512_maskz_loadu_epi32(there, from + i * pitch);
                transpose16(halves[half]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const __m512 lower = _mm512_castsi512_ps(halves[0][r]), upper = _mm512_castsi512_ps(halves[1][r]);
                const __m512bh both = _mm512_cvtne2ps_pbh(upper, lower);
                _mm512_storeu_si512(out + (row + r) * stride + d, reinterpret_cast<__m512i>(both));
            }
        }
    }
}

}  // namespace

const AttentionRows attention_avx512bf16 = {softmax, finish, dot, gradient, store_transposed};

}  // namespace entrenar
