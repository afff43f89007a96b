// entrenar_dequantize_gguf: GGUF blocks to float values. Checks sizes, picks a kernel, splits the blocks over threads.
#include "common/dispatch.h"

#include "abi/abi.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"
#include "gguf/blocks.h"

namespace entrenar::gguf {
namespace {

constexpr Paths<Dequantize> kPaths{&dequantize_generic, ENTRENAR_ON_X86(&dequantize_avx2),
                                   ENTRENAR_ON_X86(&dequantize_avx512), nullptr};
constexpr Paths<Dot> kDotPaths{&dot_generic, ENTRENAR_ON_X86(&dot_avx2), ENTRENAR_ON_X86(&dot_avx512), nullptr};

}  // namespace

BlockType block_type(int type) {
    const Dequantize& table = pick(kPaths);
    const Dot& dots = pick(kDotPaths);
    switch (type) {
        case kQ4_0:
            return {table.q4_0, dots.q4_0, kSmallBlock, 18};
        case kQ4_1:
            return {table.q4_1, dots.q4_1, kSmallBlock, 20};
        case kQ5_0:
            return {table.q5_0, dots.q5_0, kSmallBlock, 22};
        case kQ5_1:
            return {table.q5_1, dots.q5_1, kSmallBlock, 24};
        case kQ8_0:
            return {table.q8_0, dots.q8_0, kSmallBlock, 34};
        case kQ2_K:
            return {table.q2_k, dots.q2_k, kSuperBlock, 84};
        case kQ3_K:
            return {table.q3_k, dots.q3_k, kSuperBlock, 110};
        case kQ4_K:
            return {table.q4_k, dots.q4_k, kSuperBlock, 144};
        case kQ5_K:
            return {table.q5_k, dots.q5_k, kSuperBlock, 176};
        case kQ6_K:
            return {table.q6_k, dots.q6_k, kSuperBlock, 210};
        case kIQ4_NL:
            return {table.iq4_nl, dots.iq4_nl, kSmallBlock, 18};
        default:
            return {nullptr, nullptr, 0, 0};
    }
}

}  // namespace entrenar::gguf

// in: blocks of `type` (ggml's id), row after row → out: (rows, columns) of out_dtype. columns must be a multiple of
// the block.
ENTRENAR_API int entrenar_dequantize_gguf(const void* in, int64_t in_bytes, void* out, int64_t out_bytes, int64_t rows,
                                          int64_t columns, int type, int out_dtype, int threads) {
    using namespace entrenar;
    using namespace entrenar::gguf;
    const BlockType entry = block_type(type);
    if (!entry.dequantize) return kBadArgument;
    if (!is_dtype(out_dtype)) return kBadDtype;
    int64_t elements = 0;
    if (!multiply(rows, columns, &elements) || columns % entry.elements != 0) return kBadSize;
    const int64_t blocks = elements / entry.elements;
    if (const int error = check_buffer(in, in_bytes, blocks, entry.bytes)) return error;
    if (const int error = check_buffer(out, out_bytes, elements, dtype_bytes(out_dtype))) return error;
    parallel_for(blocks, 16384 / entry.elements, threads, [&](int64_t begin, int64_t end) {
        entry.dequantize({static_cast<const uint8_t*>(in) + begin * entry.bytes,
                          static_cast<char*>(out) + begin * entry.elements * dtype_bytes(out_dtype), out_dtype,
                          end - begin});
    });
    return kOk;
}
