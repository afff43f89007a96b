// entrenar_quantize_gguf: float weights to GGUF blocks. Checks sizes, picks a kernel, splits the blocks over threads.
#include "common/dispatch.h"

#include "abi/abi.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"
#include "gguf/blocks.h"

namespace entrenar::gguf {
namespace {

constexpr Paths<LegacyQuantize> kLegacyPaths{&legacy_quantize_generic, ENTRENAR_ON_X86(&legacy_quantize_avx2),
                                             ENTRENAR_ON_X86(&legacy_quantize_avx512), nullptr};
constexpr Paths<KQuantize> kKPaths{&k_quantize_generic, ENTRENAR_ON_X86(&k_quantize_avx2),
                                   ENTRENAR_ON_X86(&k_quantize_avx512), nullptr};

struct Entry {
    QuantizeKernel kernel;
    int elements, bytes;
};

Entry entry_of(int type) {
    const LegacyQuantize& legacy = pick(kLegacyPaths);
    const KQuantize& k = pick(kKPaths);
    switch (type) {
        case kQ4_0:
            return {legacy.q4_0, kSmallBlock, 18};
        case kQ4_1:
            return {legacy.q4_1, kSmallBlock, 20};
        case kQ5_0:
            return {legacy.q5_0, kSmallBlock, 22};
        case kQ5_1:
            return {legacy.q5_1, kSmallBlock, 24};
        case kQ8_0:
            return {legacy.q8_0, kSmallBlock, 34};
        case kQ4_K:
            return {k.q4_k, kSuperBlock, 144};
        case kQ5_K:
            return {k.q5_k, kSuperBlock, 176};
        case kQ6_K:
            return {k.q6_k, kSuperBlock, 210};
        default:
            return {nullptr, 0, 0};
    }
}

}  // namespace
}  // namespace entrenar::gguf

// in: weight (rows, columns) of in_dtype → out: blocks, row after row. `type` is ggml's id; importance: `columns`
// float32, or null for none (the only choice for types that are not K). columns must be a multiple of the block. A
// block with a NaN or an infinity has unspecified bytes.
ENTRENAR_API int entrenar_quantize_gguf(const void* in, int64_t in_bytes, void* out, int64_t out_bytes,
                                        const void* importance, int64_t importance_bytes, int64_t rows, int64_t columns,
                                        int type, int in_dtype, int threads) {
    using namespace entrenar;
    using namespace entrenar::gguf;
    const Entry entry = entry_of(type);
    if (!entry.kernel || (importance && entry.elements != kSuperBlock)) return kBadArgument;
    if (!is_dtype(in_dtype)) return kBadDtype;
    int64_t elements = 0;
    if (!multiply(rows, columns, &elements) || columns % entry.elements != 0) return kBadSize;
    const int64_t blocks = elements / entry.elements;
    if (const int error = check_buffer(in, in_bytes, elements, dtype_bytes(in_dtype))) return error;
    if (const int error = check_buffer(out, out_bytes, blocks, entry.bytes)) return error;
    if (importance) {
        if (const int error = check_buffer(importance, importance_bytes, columns, 4)) return error;
    }
    parallel_for(blocks, 16384 / entry.elements, threads, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * entry.elements;
        entry.kernel({static_cast<const char*>(in) + first * dtype_bytes(in_dtype), in_dtype,
                      static_cast<uint8_t*>(out) + begin * entry.bytes, end - begin,
                      static_cast<const float*>(importance), first % columns, columns});
    });
    return kOk;
}
