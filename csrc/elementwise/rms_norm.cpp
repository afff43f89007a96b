// Entry points of the RMS norm and its gradients: rows over threads; the weight's gradient by columns.
#include <algorithm>

#include "abi/abi.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

struct Matrix {
    int64_t rows, columns;
    int dtype;

    int64_t grain() const { return std::max<int64_t>(kGrainElements / std::max<int64_t>(columns, 1), 1); }
    int64_t bytes() const { return columns * dtype_bytes(dtype); }
};

int check_matrix(const Matrix& matrix, const void* buffer, int64_t bytes) {
    if (!is_dtype(matrix.dtype)) return kBadDtype;
    int64_t elements = 0;
    if (!multiply(matrix.rows, matrix.columns, &elements)) return kBadSize;
    return check_buffer(buffer, bytes, elements, dtype_bytes(matrix.dtype));
}

int check_weight(const void* weight, int64_t bytes, int64_t columns, int dtype) {
    if (!is_dtype(dtype)) return kBadDtype;
    return check_buffer(weight, bytes, columns, dtype_bytes(dtype));
}

// The weight as the kernels want it, in this thread's scratch; null if there is no memory.
const float* prepared(const Matrix& matrix, const void* weight, int weight_dtype, float offset) {
    auto* floats = reinterpret_cast<float*>(thread_scratch((matrix.columns + kLargestPair) * 4));
    if (floats) elementwise().prepare_weight(weight, weight_dtype, matrix.columns, offset, matrix.dtype, floats);
    return floats;
}

RmsNormRows rows_from(const Matrix& matrix, const void* x, int64_t begin, int64_t end, float eps) {
    return {static_cast<const char*>(x) + begin * matrix.bytes(), end - begin, matrix.columns, eps, matrix.dtype};
}

}  // namespace
}  // namespace entrenar

// x, out: (rows, columns) of dtype; weight: (columns,) of weight_dtype.
int entrenar::rms_norm(const void* x, int64_t x_bytes, const void* weight, int64_t weight_bytes, void* out,
                       int64_t out_bytes, int64_t rows, int64_t columns, float eps, float offset, int dtype,
                       int weight_dtype, int threads) {
    using namespace entrenar;
    const Matrix matrix{rows, columns, dtype};
    if (const int error = check_matrix(matrix, x, x_bytes)) return error;
    if (const int error = check_matrix(matrix, out, out_bytes)) return error;
    if (const int error = check_weight(weight, weight_bytes, columns, weight_dtype)) return error;
    if (columns == 0) return kOk;  // however many rows
    const float* floats = prepared(matrix, weight, weight_dtype, offset);
    if (!floats) return kNoMemory;
    const Elementwise& kernel = elementwise();
    parallel_for(rows, matrix.grain(), threads, [&](int64_t begin, int64_t end) {
        kernel.rms_norm(rows_from(matrix, x, begin, end, eps), floats,
                        static_cast<char*>(out) + begin * matrix.bytes());
    });
    return kOk;
}

ENTRENAR_API int entrenar_rms_norm(const void* x, int64_t x_bytes, const void* weight, int64_t weight_bytes, void* out,
                                   int64_t out_bytes, int64_t rows, int64_t columns, float eps, float offset, int dtype,
                                   int weight_dtype, int threads) {
    return entrenar::rms_norm(x, x_bytes, weight, weight_bytes, out, out_bytes, rows, columns, eps, offset, dtype,
                              weight_dtype, threads);
}

// grad, x, dx: (rows, columns) of dtype, and `added`, which may be null, is added to dx; weight: (columns,) of
// weight_dtype.
int entrenar::rms_norm_backward(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes,
                                const void* weight, int64_t weight_bytes, const void* added, int64_t added_bytes,
                                void* dx, int64_t dx_bytes, int64_t rows, int64_t columns, float eps, float offset,
                                int dtype, int weight_dtype, int threads) {
    using namespace entrenar;
    const Matrix matrix{rows, columns, dtype};
    if (const int error = check_matrix(matrix, grad, grad_bytes)) return error;
    if (const int error = check_matrix(matrix, x, x_bytes)) return error;
    if (const int error = check_matrix(matrix, dx, dx_bytes)) return error;
    if (added != nullptr) {
        if (const int error = check_matrix(matrix, added, added_bytes)) return error;
    }
    if (const int error = check_weight(weight, weight_bytes, columns, weight_dtype)) return error;
    if (columns == 0) return kOk;  // however many rows
    const float* floats = prepared(matrix, weight, weight_dtype, offset);
    if (!floats) return kNoMemory;
    const Elementwise& kernel = elementwise();
    parallel_for(rows, matrix.grain(), threads, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * matrix.bytes();
        kernel.rms_norm_backward(rows_from(matrix, x, begin, end, eps), floats, static_cast<const char*>(grad) + at,
                                 added ? static_cast<const char*>(added) + at : nullptr, static_cast<char*>(dx) + at);
    });
    return kOk;
}

ENTRENAR_API int entrenar_rms_norm_backward(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes,
                                            const void* weight, int64_t weight_bytes, const void* added,
                                            int64_t added_bytes, void* dx, int64_t dx_bytes, int64_t rows,
                                            int64_t columns, float eps, float offset, int dtype, int weight_dtype,
                                            int threads) {
    return entrenar::rms_norm_backward(grad, grad_bytes, x, x_bytes, weight, weight_bytes, added, added_bytes, dx,
                                       dx_bytes, rows, columns, eps, offset, dtype, weight_dtype, threads);
}

// grad, x: (rows, columns) of dtype; dweight: (columns,) of weight_dtype.
ENTRENAR_API int entrenar_rms_norm_backward_weight(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes,
                                                   void* dweight, int64_t dweight_bytes, int64_t rows, int64_t columns,
                                                   float eps, int dtype, int weight_dtype, int threads) {
    using namespace entrenar;
    const Matrix matrix{rows, columns, dtype};
    if (const int error = check_matrix(matrix, grad, grad_bytes)) return error;
    if (const int error = check_matrix(matrix, x, x_bytes)) return error;
    if (const int error = check_weight(dweight, dweight_bytes, columns, weight_dtype)) return error;
    if (columns == 0) return kOk;
    auto* norms = reinterpret_cast<float*>(thread_scratch(rows * 4));
    if (!norms) return kNoMemory;
    const Elementwise& kernel = elementwise();
    parallel_for(rows, matrix.grain(), threads, [&](int64_t begin, int64_t end) {
        kernel.reciprocal_norms(rows_from(matrix, x, begin, end, eps), norms + begin);
    });
    const RmsNormRows all = rows_from(matrix, x, 0, rows, eps);
    const int64_t panels = divide_up(columns, kPanelColumns);
    parallel_for(panels, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * kPanelColumns;
            const int64_t count = std::min(kPanelColumns, columns - first);
            kernel.rms_norm_backward_weight(all, norms, grad, first, count, dweight, weight_dtype);
        }
    });
    return kOk;
}
