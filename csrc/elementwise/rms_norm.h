// Root-mean-square norm (Zhang and Sennrich 2019): y = w · x · r with r = 1 / √(mean(x²) + eps), and its gradients.
//
// With h = grad · w:  dx = r · h − x · r³ · mean(h · x);  dw = Σ over rows of grad · x · r.
#pragma once

#include <math.h>

#include "common/pairs.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

template <int kDtype>
void prepare_in_order(const void* weight, int weight_dtype, int64_t columns, float offset, float* prepared) {
    widen_in_order<kDtype>(weight, weight_dtype, 0, columns, prepared);
    for (int64_t i = 0; i < padded(columns); ++i) prepared[i] += offset;
}

void prepare_weight(const void* weight, int weight_dtype, int64_t columns, float offset, int dtype, float* prepared) {
    ENTRENAR_FOR_DTYPE(dtype, prepare_in_order, weight, weight_dtype, columns, offset, prepared);
}

inline float reciprocal_norm(float squares, const RmsNormRows& rows) {
    return 1.0f / ::sqrtf(squares / static_cast<float>(rows.columns) + rows.eps);
}

template <int kDtype>
inline float sum_of_squares(const char* x, int64_t columns) {
    Pair squares{};
    const void* const in[] = {x};
    map_pairs<kDtype, 1, 0>(in, nullptr, columns, 0.0f, [&](int64_t, const Pair* from, Pair*) ENTRENAR_INLINE {
        squares.a = fused(from[0].a, from[0].a, squares.a);
        squares.b = fused(from[0].b, from[0].b, squares.b);
    });
    return sum(squares.a + squares.b);
}

template <int kDtype>
void norm_rows(const RmsNormRows& rows, const float* weight, void* out) {
    const auto* x = static_cast<const char*>(rows.x);
    auto* y = static_cast<char*>(out);
    const int64_t stride = rows.columns * kBytes<kDtype>;
    for (int64_t row = 0; row < rows.rows; ++row, x += stride, y += stride) {
        const float r = reciprocal_norm(sum_of_squares<kDtype>(x, rows.columns), rows);
        const void* const in[] = {x};
        void* const to[] = {y};
        const auto scale = [=](int64_t at, const Pair* from, Pair* results) ENTRENAR_INLINE {
            const Pair w = load_floats(weight + at);
            results[0] = {from[0].a * r * w.a, from[0].b * r * w.b};
        };
        map_pairs<kDtype, 1, 1>(in, to, rows.columns, 0.0f, scale);
    }
}

void rms_norm(const RmsNormRows& rows, const float* weight, void* out) {
    ENTRENAR_FOR_DTYPE(rows.dtype, norm_rows, rows, weight, out);
}

// Σ x² and Σ grad · w · x of one row.
struct Sums {
    float squares, products;
};

template <int kDtype>
inline Sums sums_of(const void* const* in, const float* weight, int64_t columns) {
    Pair squares{}, products{};
    map_pairs<kDtype, 2, 0>(in, nullptr, columns, 0.0f, [&](int64_t at, const Pair* from, Pair*) ENTRENAR_INLINE {
        const Pair w = load_floats(weight + at), &x = from[0], &grad = from[1];
        squares.a = fused(x.a, x.a, squares.a);
        squares.b = fused(x.b, x.b, squares.b);
        products.a = fused(grad.a * w.a, x.a, products.a);
        products.b = fused(grad.b * w.b, x.b, products.b);
    });
    return {sum(squares.a + squares.b), sum(products.a + products.b)};
}

// kIn is 3 where a third row is added to the result.
template <int kDtype, int kIn>
void project_row(const void* const* in, const float* weight, const RmsNormRows& rows, void* dx) {
    const Sums sums = sums_of<kDtype>(in, weight, rows.columns);
    const float r = reciprocal_norm(sums.squares, rows);
    const float pull = r * r * r * (sums.products / static_cast<float>(rows.columns));
    map_pairs<kDtype, kIn, 1>(in, &dx, rows.columns, 0.0f,
                              [=](int64_t at, const Pair* from, Pair* results) ENTRENAR_INLINE {
                                  const Pair w = load_floats(weight + at), &x = from[0], &g = from[1];
                                  results[0] = {g.a * w.a * r - x.a * pull, g.b * w.b * r - x.b * pull};
                                  if constexpr (kIn == 3)
                                      results[0] = {results[0].a + from[2].a, results[0].b + from[2].b};
                              });
}

template <int kDtype>
void backward_rows(const RmsNormRows& rows, const float* weight, const void* grad, const void* added, void* dx) {
    const int64_t stride = rows.columns * kBytes<kDtype>;
    const auto at = [stride](const void* from, int64_t row) { return static_cast<const char*>(from) + row * stride; };
    for (int64_t row = 0; row < rows.rows; ++row) {
        const void* const in[] = {at(rows.x, row), at(grad, row), added ? at(added, row) : nullptr};
        (added ? project_row<kDtype, 3> : project_row<kDtype, 2>)(in, weight, rows,
                                                                  static_cast<char*>(dx) + row * stride);
    }
}

void rms_norm_backward(const RmsNormRows& rows, const float* weight, const void* grad, const void* added, void* dx) {
    ENTRENAR_FOR_DTYPE(rows.dtype, backward_rows, rows, weight, grad, added, dx);
}

template <int kDtype>
void reciprocals_of(const RmsNormRows& rows, float* out) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        const char* x = static_cast<const char*>(rows.x) + row * rows.columns * kBytes<kDtype>;
        out[row] = reciprocal_norm(sum_of_squares<kDtype>(x, rows.columns), rows);
    }
}

void reciprocal_norms(const RmsNormRows& rows, float* out) {
    ENTRENAR_FOR_DTYPE(rows.dtype, reciprocals_of, rows, out);
}

// Sums of this many rows are added to the total: each addend is rounded to a small sum rather than to a large one.
constexpr int64_t kRowsAtOnce = 64;

// sums[…] += grad · x · r over rows [first, last) and columns [begin, begin + count).
template <int kDtype>
void add_rows(const RmsNormRows& rows, const float* reciprocals, const void* grad, int64_t first, int64_t last,
              int64_t begin, int64_t count, float* sums) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t offset = (row * rows.columns + begin) * kBytes<kDtype>;
        const void* const in[] = {static_cast<const char*>(rows.x) + offset, static_cast<const char*>(grad) + offset};
        const float r = reciprocals[row];
        map_pairs<kDtype, 2, 0>(in, nullptr, count, 0.0f, [&](int64_t at, const Pair* from, Pair*) ENTRENAR_INLINE {
            const Pair before = load_floats(sums + at), &x = from[0], &g = from[1];
            store_floats(sums + at, {fused(x.a * r, g.a, before.a), fused(x.b * r, g.b, before.b)});
        });
    }
}

template <int kDtype>
void weight_panel(const RmsNormRows& rows, const float* reciprocals, const void* grad, int64_t begin, int64_t count,
                  void* dweight, int weight_dtype) {
    float total[kPanelColumns] = {};
    for (int64_t first = 0; first < rows.rows; first += kRowsAtOnce) {
        const int64_t last = first + kRowsAtOnce < rows.rows ? first + kRowsAtOnce : rows.rows;
        float part[kPanelColumns] = {};
        add_rows<kDtype>(rows, reciprocals, grad, first, last, begin, count, part);
        for (int64_t i = 0; i < kPanelColumns; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < count; ++i) store_element(dweight, weight_dtype, begin + i, total[place_of<kDtype>(i)]);
}

void rms_norm_backward_weight(const RmsNormRows& rows, const float* reciprocals, const void* grad, int64_t begin,
                              int64_t count, void* dweight, int weight_dtype) {
    ENTRENAR_FOR_DTYPE(rows.dtype, weight_panel, rows, reciprocals, grad, begin, count, dweight, weight_dtype);
}

}  // namespace
}  // namespace entrenar
