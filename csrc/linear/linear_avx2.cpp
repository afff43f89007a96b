// Few-token inner loops, 8 lanes of float32.
#include "common/avx2.h"
#include "linear/linear.h"

namespace entrenar {
namespace {

template <int kDtype>
constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;

inline float sum_lanes(__m256 values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <int kDtype>
void dot_token(const char* rows, const char* x, int64_t columns, float* out) {
    __m256 sums[kTileRows] = {};
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        const __m256 token = load8<kDtype>(x + k * kBytes<kDtype>);
        for (int64_t r = 0; r < kTileRows; ++r) {
            const __m256 weight = load8<kDtype>(rows + (r * kTileColumns + k) * kBytes<kDtype>);
            sums[r] = _mm256_fmadd_ps(weight, token, sums[r]);
        }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
        float sum = sum_lanes(sums[r]);
        for (int64_t i = k; i < columns; ++i) {
            sum += load_element(rows, kDtype, r * kTileColumns + i) * load_element(x, kDtype, i);
        }
        out[r] += sum;
    }
}

template <int kDtype>
void dot_tokens(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
        const char* token = static_cast<const char*>(x) + t * x_stride * kBytes<kDtype>;
        dot_token<kDtype>(static_cast<const char*>(rows), token, columns, sums + t * kTileRows);
    }
}

void dot(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype, float* sums) {
    const auto chosen = dtype == kFloat32   ? dot_tokens<kFloat32>
                        : dtype == kFloat16 ? dot_tokens<kFloat16>
                                            : dot_tokens<kBfloat16>;
    chosen(rows, x, x_stride, tokens, columns, sums);
}

template <int kDtype>
void accumulate_tokens(const void* rows, const float* factors, int64_t tokens, int64_t columns, float* sums) {
    const auto* from = static_cast<const char*>(rows);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        __m256 weights[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
            weights[r] = load8<kDtype>(from + (r * kBackwardColumns + k) * kBytes<kDtype>);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = sums + t * kBackwardColumns + k;
            __m256 sum = _mm256_loadu_ps(to);
            for (int64_t r = 0; r < kTileRows; ++r) {
                sum = _mm256_fmadd_ps(_mm256_set1_ps(factors[t * kTileRows + r]), weights[r], sum);
            }
            _mm256_storeu_ps(to, sum);
        }
    }
    for (; k < columns; ++k) {
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t r = 0; r < kTileRows; ++r) {
                const float weight = load_element(from, kDtype, r * kBackwardColumns + k);
                sums[t * kBackwardColumns + k] += factors[t * kTileRows + r] * weight;
            }
        }
    }
}

void accumulate(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums) {
    const auto chosen = dtype == kFloat32   ? accumulate_tokens<kFloat32>
                        : dtype == kFloat16 ? accumulate_tokens<kFloat16>
                                            : accumulate_tokens<kBfloat16>;
    chosen(rows, factors, tokens, columns, sums);
}

}  // namespace

const Linear linear_avx2 = {dot, accumulate, nullptr};

}  // namespace entrenar
