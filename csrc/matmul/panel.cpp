// Packing of plain bfloat16 rows, and blocks over a packed panel.
#include "matmul/panel.h"

#include <algorithm>
#include <cstring>

#include "common/prefetch.h"

namespace entrenar {
namespace {

uint16_t* strip_at(uint16_t* to, int64_t group_elements, int64_t strip) {
    return to + strip / 2 * group_elements + strip % 2 * (kStepElements / 2);
}

}  // namespace

void pack_rows(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count, int64_t width,
               uint16_t* to) {
    const int64_t group_elements = packed_group(count), groups = width / kGroup, rest = width % kGroup;
    alignas(64) static const uint16_t zeros[kMaxPlainWidth] = {};
    for (int64_t k = 0; k < (count + kStep - 1) / kStep * kStep; k += 2) {
        const uint16_t* first = k < count ? rows + k * stride : zeros;
        const uint16_t* second = k + 1 < count ? rows + (k + 1) * stride : zeros;
        uint16_t* pair = to + k / kStep * kStepElements + k % kStep * kStrip;
        for (int64_t r = k; r < k + 2; ++r) fetch_row_ahead(rows + r * stride, stride * 2, width * 2);
        kernel.pack_pairs(first, second, groups, group_elements, pair);
        if (rest == 0) continue;
        alignas(64) uint16_t two[2][kGroup] = {};
        std::memcpy(two[0], first + groups * kGroup, static_cast<size_t>(rest) * 2);
        std::memcpy(two[1], second + groups * kGroup, static_cast<size_t>(rest) * 2);
        kernel.pack_pairs(two[0], two[1], 1, group_elements, pair + groups * group_elements);
    }
}

void pack_rows_transposed(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count,
                          int64_t width, uint16_t* to) {
    const int64_t group_elements = packed_group(width);
    alignas(64) uint16_t rest[kStrip * kStep];
    for (int64_t row = 0; row < (count + kGroup - 1) / kGroup * kGroup; row += kStrip) {
        uint16_t* strip = strip_at(to, group_elements, row / kStrip);
        const int64_t there = std::clamp<int64_t>(count - row, 0, kStrip);
        for (int64_t r = row; r < row + kStrip; ++r) fetch_row_ahead(rows + r * stride, stride * 2, width * 2);
        for (int64_t k = 0; k < width; k += kStep, strip += kStepElements) {
            if (there == kStrip) {
                kernel.pack_transposed(rows + row * stride + k, stride, strip);
                continue;
            }
            std::memset(rest, 0, sizeof rest);
            for (int64_t r = 0; r < there; ++r) std::memcpy(rest + r * kStep, rows + (row + r) * stride + k, kStep * 2);
            kernel.pack_transposed(rest, kStep, strip);
        }
    }
}

void transpose_rows(const MatmulKernel& kernel, const uint16_t* rows, int64_t stride, int64_t count, int64_t width,
                    int64_t padded, uint16_t* packed, uint16_t* to) {
    pack_rows(kernel, rows, stride, count, width, packed);
    // A packed strip is [pair of rows][column][2]: transposed as dwords, a column's pairs lie in a row.
    alignas(64) uint16_t transposed[kStrip * kStep];
    const int64_t steps = (count + kStep - 1) / kStep;
    for (int64_t column = 0; column < width; column += kStrip) {
        const uint16_t* strip = strip_at(packed, packed_group(count), column / kStrip);
        for (int64_t step = 0; step < steps; ++step, strip += kStepElements) {
            kernel.pack_transposed(strip, kStep, transposed);
            for (int64_t c = 0; c < kStrip; ++c) {
                std::memcpy(to + (column + c) * padded + step * kStep, transposed + c * kStep, kStep * 2);
            }
        }
        for (int64_t c = 0; c < kStrip && steps * kStep < padded; ++c) {
            std::memset(to + (column + c) * padded + steps * kStep, 0, static_cast<size_t>(padded - steps * kStep) * 2);
        }
    }
}

void multiply_packed(const PackedProduct& product, float* c, int64_t pitch, bool add) {
    const MatmulKernel& kernel = *product.kernel;
    for (int64_t row = 0; row < product.rows; row += kernel.rows) {
        const Run run{reinterpret_cast<const char*>(product.a + row * product.a_stride), product.a_stride * 2,
                      product.b, product.steps};
        const int64_t rows = std::min(kernel.rows, product.rows - row);
        for (int64_t group = 0; group < product.groups; group += kernel.groups) {
            const int64_t groups = std::min(kernel.groups, product.groups - group);
            kernel.block(&run, 1, rows, groups * 2, group * product.group_elements, product.group_elements,
                         c + row * pitch + group * kGroup, pitch, add);
        }
    }
}

}  // namespace entrenar
