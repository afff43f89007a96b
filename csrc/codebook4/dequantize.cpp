// Entry point of codebook dequantization.
#include "codebook4/dequantize.h"

#include <algorithm>
#include <cstring>
#include "abi/abi.h"

#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

// A result of this many bytes does not stay in any cache, and writing past them saves reading it in first.
constexpr int64_t kStreamBytes = 24 << 20;

const Paths<DequantizeCodebook> kPaths = {&dequantize_codebook_generic, ENTRENAR_ON_X86(&dequantize_codebook_avx2),
                                          ENTRENAR_ON_X86(&dequantize_codebook_avx512),
                                          ENTRENAR_ON_ARM(&dequantize_codebook_neon)};

}  // namespace

const DequantizeCodebook& dequantize_codebook_kernel() { return pick(kPaths); }

int read_codebook_weight(const void* packed, int64_t packed_bytes, const ScaleBuffers& scales, const void* codebook,
                         int64_t codebook_bytes, int64_t block_size, int64_t count, CodebookWeight* weight) {
    if (count < 0) return kBadSize;
    if (block_size < 2 || block_size % 2 != 0) return kBadBlockSize;
    if (const int error = check_buffer(packed, packed_bytes, divide_up(count, 2), 1)) return error;
    if (const int error = check_buffer(codebook, codebook_bytes, 16, 4)) return error;
    if (const int error = check_scales(scales, divide_up(count, block_size))) return error;
    *weight = {static_cast<const uint8_t*>(packed), scales, {}, block_size, count};
    std::memcpy(weight->codebook, codebook, sizeof weight->codebook);
    return kOk;
}

void decode(const DequantizeCodebook& kernel, const CodebookWeight& weight, int64_t begin, int64_t end, void* out,
            int dtype, bool stream) {
    float scales[kScaleGroup];
    while (begin < end) {
        const int64_t first = begin / weight.block_size;
        const int64_t blocks = std::min(divide_up(end, weight.block_size) - first, kScaleGroup);
        const int64_t stop = std::min((first + blocks) * weight.block_size, end);
        decode_scales(weight.scales, first, blocks, scales);
        kernel.range(weight.packed, scales, weight.codebook, weight.block_size, begin, stop, out, dtype, stream);
        out = static_cast<char*>(out) + (stop - begin) * dtype_bytes(dtype);
        begin = stop;
    }
}

}  // namespace entrenar

// packed: ceil(count / 2) bytes; scales: see scales/scales.h; codebook: 16 float32; out: count floats of `dtype`.
ENTRENAR_API int entrenar_dequantize_codebook(const void* packed, int64_t packed_bytes, const void* scales,
                                              int64_t scales_bytes, const void* group, int64_t group_bytes,
                                              const void* offset, int64_t offset_bytes, const void* map,
                                              int64_t map_bytes, const void* codebook, int64_t codebook_bytes,
                                              void* out, int64_t out_bytes, int64_t count, int64_t block_size,
                                              int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    const ScaleBuffers block_scales{scales, scales_bytes, group, group_bytes, offset, offset_bytes, map, map_bytes};
    CodebookWeight weight;
    if (const int error = read_codebook_weight(packed, packed_bytes, block_scales, codebook, codebook_bytes, block_size,
                                               count, &weight)) {
        return error;
    }
    if (const int error = check_buffer(out, out_bytes, count, dtype_bytes(dtype))) return error;
    const DequantizeCodebook& kernel = dequantize_codebook_kernel();
    const int64_t blocks = divide_up(count, block_size), grain = std::max<int64_t>(kGrainElements / block_size, 1);
    const bool stream = count * dtype_bytes(dtype) >= kStreamBytes;
    parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
        char* to = static_cast<char*>(out) + begin * block_size * dtype_bytes(dtype);
        decode(kernel, weight, begin * block_size, std::min(end * block_size, count), to, dtype, stream);
    });
    return kOk;
}

// A panel of a weight (any rows, `columns`): rows [row, row + panel_rows), columns [column, column + panel_columns),
// into out (panel_rows, panel_columns). `count` is the number of elements of the whole weight.
ENTRENAR_API int entrenar_dequantize_codebook_panel(const void* packed, int64_t packed_bytes, const void* scales,
                                                    int64_t scales_bytes, const void* group, int64_t group_bytes,
                                                    const void* offset, int64_t offset_bytes, const void* map,
                                                    int64_t map_bytes, const void* codebook, int64_t codebook_bytes,
                                                    void* out, int64_t out_bytes, int64_t count, int64_t columns,
                                                    int64_t row, int64_t panel_rows, int64_t column,
                                                    int64_t panel_columns, int64_t block_size, int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    const ScaleBuffers block_scales{scales, scales_bytes, group, group_bytes, offset, offset_bytes, map, map_bytes};
    CodebookWeight weight;
    if (const int error = read_codebook_weight(packed, packed_bytes, block_scales, codebook, codebook_bytes, block_size,
                                               count, &weight)) {
        return error;
    }
    int64_t elements = 0, reach = 0;
    if (!multiply(panel_rows, panel_columns, &elements) || row < 0 || column < 0) return kBadSize;
    if (column > columns || panel_columns > columns - column) return kBadArgument;
    if (__builtin_add_overflow(row, panel_rows, &reach) || !multiply(reach, columns, &reach)) return kBadSize;
    if (reach > count) return kBadArgument;
    if (const int error = check_buffer(out, out_bytes, elements, dtype_bytes(dtype))) return error;
    if (elements == 0) return kOk;
    const DequantizeCodebook& kernel = dequantize_codebook_kernel();
    const int64_t grain = std::max<int64_t>(kGrainElements / panel_columns, 1);
    parallel_for(panel_rows, grain, threads, [&](int64_t begin, int64_t end) {
        char* to = static_cast<char*>(out) + begin * panel_columns * dtype_bytes(dtype);
        if (panel_columns == columns) {
            return decode(kernel, weight, (row + begin) * columns, (row + end) * columns, to, dtype, false);
        }
        for (int64_t r = begin; r < end; ++r, to += panel_columns * dtype_bytes(dtype)) {
            const int64_t from = (row + r) * columns + column;
            decode(kernel, weight, from, from + panel_columns, to, dtype, false);
        }
    });
    return kOk;
}
