// A float32 or bfloat16 matrix, times a number.
#include <algorithm>
#include <cstring>

#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "matmul/matmul.h"
#include "weights/weight.h"

namespace entrenar {
namespace {

bool is_plain(const SourceView& view) { return view.dtype == kBfloat16 && view.scale == 1.0f; }

int check(const SourceView& view, int64_t, Weight*) {
    if (view.dtype != kFloat32 && view.dtype != kBfloat16) return kBadDtype;
    if (view.stride < view.columns) return kBadArgument;
    int64_t reach = 0;
    if (!multiply(std::max<int64_t>(view.rows - 1, 0), view.stride, &reach)) return kBadSize;
    if (__builtin_add_overflow(reach, view.rows > 0 ? view.columns : 0, &reach)) return kBadSize;
    return check_buffer(view.data, view.data_bytes, reach, dtype_bytes(view.dtype));
}

void decode(const Weight& weight, int64_t row, int64_t column, int64_t count, void* to, int) {
    const SourceView& view = weight.view;
    auto* out = static_cast<uint16_t*>(to);
    const int64_t first = row * view.stride + column;
    if (is_plain(view)) {
        std::memcpy(out, static_cast<const char*>(view.data) + first * 2, static_cast<size_t>(count) * 2);
        return;
    }
    if (view.dtype == kFloat32) {
        const auto* values = static_cast<const float*>(view.data) + first;
        matmul_kernel().store_bf16({out, nullptr, nullptr, 0, 1, count}, values, 0, view.scale);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        out[i] = float_to_bf16(load_element(view.data, view.dtype, first + i) * view.scale);
    }
}

const uint16_t* plain(const Weight& weight, int64_t row, int64_t column, int64_t* stride) {
    const SourceView& view = weight.view;
    if (!is_plain(view)) return nullptr;
    *stride = view.stride;
    return static_cast<const uint16_t*>(view.data) + row * view.stride + column;
}

}  // namespace

const WeightKind kDenseKind = {SourceKind::dense, check, decode, false, plain, nullptr, nullptr};

}  // namespace entrenar
