// Few-token inner loops in portable C++. Sixteen partial sums side by side, which any compiler turns into vectors.
#include "common/floats.h"
#include "linear/linear.h"

namespace entrenar {
namespace {

constexpr int kLanes = 16;

float dot_row(const void* row, const void* x, int64_t row_at, int64_t x_at, int64_t columns, int dtype) {
    float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= columns; k += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += load_element(row, dtype, row_at + k + lane) * load_element(x, dtype, x_at + k + lane);
        }
    }
    for (; k < columns; ++k) lanes[0] += load_element(row, dtype, row_at + k) * load_element(x, dtype, x_at + k);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

void dot(const void* rows, const void* x, int64_t x_stride, int64_t tokens, int64_t columns, int dtype, float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < kTileRows; ++r) {
            sums[t * kTileRows + r] += dot_row(rows, x, r * kTileColumns, t * x_stride, columns, dtype);
        }
    }
}

void accumulate(const void* rows, const float* factors, int64_t tokens, int64_t columns, int dtype, float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < kTileRows; ++r) {
            const float factor = factors[t * kTileRows + r];
            float* to = sums + t * kBackwardColumns;
            for (int64_t k = 0; k < columns; ++k) to[k] += factor * load_element(rows, dtype, r * kBackwardColumns + k);
        }
    }
}

}  // namespace

const Linear linear_generic = {dot, accumulate, nullptr};

}  // namespace entrenar
