// Entry point of the rotary position embedding: positions over threads.
#include <algorithm>

#include "abi/abi.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

// Elements from the first of a strided tensor to its last, both included; false if that overflows.
bool extent_of(const int64_t (&sizes)[4], const int64_t (&strides)[4], int64_t* extent) {
    *extent = 1;
    for (int axis = 0; axis < 4; ++axis) {
        int64_t reach = 0;
        if (!multiply(sizes[axis] - 1, strides[axis], &reach) || __builtin_add_overflow(*extent, reach, extent)) {
            return false;
        }
    }
    return true;
}

}  // namespace

int check_turns(const void* cos, int64_t cos_bytes, const void* sin, int64_t sin_bytes, int64_t batch, int64_t tokens,
                int64_t width, int64_t rotated, int64_t cos_batches, int cos_dtype) {
    if (!is_dtype(cos_dtype)) return kBadDtype;
    int64_t turns = 0;
    if (!multiply(cos_batches, tokens, &turns) || !multiply(turns, rotated, &turns)) return kBadSize;
    if (rotated > width || rotated % 2 != 0 || (cos_batches != 1 && cos_batches != batch)) return kBadArgument;
    if (const int error = check_buffer(cos, cos_bytes, turns, dtype_bytes(cos_dtype))) return error;
    return check_buffer(sin, sin_bytes, turns, dtype_bytes(cos_dtype));
}

}  // namespace entrenar

// x: (batch, tokens, heads, width) of dtype, elements of a head side by side, the other strides in elements; cos, sin:
// (cos_batches, tokens, rotated) of cos_dtype, cos_batches 1 or batch; out: as x, contiguous.
int entrenar::rotary(const void* x, int64_t x_bytes, const void* cos, int64_t cos_bytes, const void* sin,
                     int64_t sin_bytes, void* out, int64_t out_bytes, int64_t batch, int64_t tokens, int64_t heads,
                     int64_t width, int64_t rotated, int64_t batch_stride, int64_t token_stride, int64_t head_stride,
                     int64_t cos_batches, int dtype, int cos_dtype, int transpose, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    int64_t positions = 0, position = 0, elements = 0, extent = 0;
    if (!multiply(batch, tokens, &positions) || !multiply(heads, width, &position) ||
        !multiply(positions, position, &elements)) {
        return kBadSize;
    }
    if (const int error =
            check_turns(cos, cos_bytes, sin, sin_bytes, batch, tokens, width, rotated, cos_batches, cos_dtype)) {
        return error;
    }
    if (const int error = check_buffer(out, out_bytes, elements, dtype_bytes(dtype))) return error;
    if (elements == 0) return kOk;
    const int64_t sizes[] = {batch, tokens, heads, width}, strides[] = {batch_stride, token_stride, head_stride, 1};
    if (!extent_of(sizes, strides, &extent)) return kBadSize;
    if (const int error = check_buffer(x, x_bytes, extent, dtype_bytes(dtype))) return error;
    const Rotation rotation{x,           cos,         sin,     out,          tokens,
                            heads,       width,       rotated, batch_stride, token_stride,
                            head_stride, cos_batches, dtype,   cos_dtype,    transpose != 0};
    const Elementwise& kernel = elementwise();
    parallel_for(positions, std::max<int64_t>(kGrainElements / position, 1), threads,
                 [&](int64_t begin, int64_t end) { kernel.rotate(rotation, begin, end); });
    return kOk;
}

ENTRENAR_API int entrenar_rotary(const void* x, int64_t x_bytes, const void* cos, int64_t cos_bytes, const void* sin,
                                 int64_t sin_bytes, void* out, int64_t out_bytes, int64_t batch, int64_t tokens,
                                 int64_t heads, int64_t width, int64_t rotated, int64_t batch_stride,
                                 int64_t token_stride, int64_t head_stride, int64_t cos_batches, int dtype,
                                 int cos_dtype, int transpose, int threads) {
    return entrenar::rotary(x, x_bytes, cos, cos_bytes, sin, sin_bytes, out, out_bytes, batch, tokens, heads, width,
                            rotated, batch_stride, token_stride, head_stride, cos_batches, dtype, cos_dtype, transpose,
                            threads);
}
