// Entry points of the symmetric integer formats.
#include "symmetric/symmetric.h"

#include <algorithm>
#include "abi/abi.h"

#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

const Paths<Symmetric> kPaths = {&symmetric_generic, ENTRENAR_ON_X86(&symmetric_avx2),
                                 ENTRENAR_ON_X86(&symmetric_avx512), nullptr};

// body(begin, end, scales) over runs of elements whose scales were decoded; scales[0] is that of the first one's block.
template <class Body>
void over_runs(const Int8Weight& weight, int64_t begin, int64_t end, const Body& body) {
    const int64_t block_size = weight.block_size;
    float scales[kScaleGroup];
    for (int64_t stop; begin < end; begin = stop) {
        const int64_t first = begin / block_size;
        const int64_t blocks = std::min(divide_up(end - first * block_size, block_size), kScaleGroup);
        stop = blocks * block_size < end - first * block_size ? (first + blocks) * block_size : end;
        decode_scales(weight.scales, first, blocks, scales);
        body(begin, stop, scales);
    }
}

int64_t grain_of(int64_t block_size) { return std::max<int64_t>(kGrainElements / block_size, 1); }

}  // namespace

const Symmetric& symmetric_kernel() { return pick(kPaths); }

int read_int8(const void* codes, int64_t codes_bytes, const ScaleBuffers& scales, int64_t block_size, int64_t count,
              Int8Weight* weight) {
    if (count < 0) return kBadSize;
    if (block_size < 1) return kBadBlockSize;
    if (const int error = check_buffer(codes, codes_bytes, count, 1)) return error;
    if (const int error = check_scales(scales, divide_up(count, block_size))) return error;
    *weight = {static_cast<const int8_t*>(codes), scales, block_size};
    return kOk;
}

void decode(const Symmetric& kernel, const Int8Weight& weight, int64_t begin, int64_t end, void* out, int dtype) {
    over_runs(weight, begin, end, [&](int64_t from, int64_t to, const float* scales) {
        char* at = static_cast<char*>(out) + (from - begin) * dtype_bytes(dtype);
        kernel.dequantize(weight.codes, scales, weight.block_size, from, to, at, dtype);
    });
}

void dot(const Symmetric& kernel, const Int8Weight& weight, int64_t begin, int64_t end, const float* x,
         int64_t x_stride, int64_t tokens, float* sums) {
    std::fill_n(sums, tokens, 0.0f);
    over_runs(weight, begin, end, [&](int64_t from, int64_t to, const float* scales) {
        kernel.dot(weight.codes, scales, weight.block_size, from, to, x + (from - begin), x_stride, tokens, sums);
    });
}

}  // namespace entrenar

// in: count floats of `dtype`; limit 7 or 127; codes: ceil(count / 2) or count bytes; scales: one float32 a block.
ENTRENAR_API int entrenar_quantize_symmetric(const void* in, int64_t in_bytes, void* codes, int64_t codes_bytes,
                                             void* scales, int64_t scales_bytes, int64_t count, int64_t block_size,
                                             int limit, int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (limit != 7 && limit != 127) return kBadArgument;
    if (count < 0) return kBadSize;
    const int per_byte = limit == 7 ? 2 : 1;
    if (block_size < 1 || block_size % per_byte != 0) return kBadBlockSize;
    const int64_t blocks = divide_up(count, block_size);
    if (const int error = check_buffer(in, in_bytes, count, dtype_bytes(dtype))) return error;
    if (const int error = check_buffer(codes, codes_bytes, divide_up(count, per_byte), 1)) return error;
    if (const int error = check_buffer(scales, scales_bytes, blocks, 4)) return error;
    const Symmetric& kernel = symmetric_kernel();
    parallel_for(blocks, grain_of(block_size), threads, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * block_size, elements = end == blocks ? count - from : (end - begin) * block_size;
        kernel.quantize(static_cast<const char*>(in) + from * dtype_bytes(dtype), dtype, limit, block_size, elements,
                        static_cast<uint8_t*>(codes) + from / per_byte, static_cast<char*>(scales) + begin * 4);
    });
    return kOk;
}

// codes: count int8; scales: see scales/scales.h; out: count floats of `dtype`.
ENTRENAR_API int entrenar_dequantize_int8(const void* codes, int64_t codes_bytes, const void* scales,
                                          int64_t scales_bytes, const void* group, int64_t group_bytes,
                                          const void* offset, int64_t offset_bytes, const void* map, int64_t map_bytes,
                                          void* out, int64_t out_bytes, int64_t count, int64_t block_size, int dtype,
                                          int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    const ScaleBuffers block_scales{scales, scales_bytes, group, group_bytes, offset, offset_bytes, map, map_bytes};
    Int8Weight weight;
    if (const int error = read_int8(codes, codes_bytes, block_scales, block_size, count, &weight)) return error;
    if (const int error = check_buffer(out, out_bytes, count, dtype_bytes(dtype))) return error;
    const Symmetric& kernel = symmetric_kernel();
    const int64_t blocks = divide_up(count, block_size);
    parallel_for(blocks, grain_of(block_size), threads, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * block_size, to = end == blocks ? count : end * block_size;
        decode(kernel, weight, from, to, static_cast<char*>(out) + from * dtype_bytes(dtype), dtype);
    });
    return kOk;
}
