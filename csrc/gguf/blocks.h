// GGUF's block types: ids, sizes, and the kernel tables that every path fills (ggml's layouts, see docs and the `gguf`
// package; a tensor is a flat list of blocks, because a row is always whole blocks).
#pragma once

#include <cstdint>

namespace entrenar::gguf {

// ggml's type ids, as they stand in a GGUF file.
enum Type : int {
    kQ4_0 = 2,
    kQ4_1 = 3,
    kQ5_0 = 6,
    kQ5_1 = 7,
    kQ8_0 = 8,
    kQ2_K = 10,
    kQ3_K = 11,
    kQ4_K = 12,
    kQ5_K = 13,
    kQ6_K = 14,
    kIQ4_NL = 20,
};

constexpr int kSmallBlock = 32;   // elements in a block of the legacy types and IQ4_NL
constexpr int kSuperBlock = 256;  // elements in a block of the K types

// A run of consecutive blocks to quantize. `in` and `out` are where the run starts and need no alignment.
struct QuantizeRun {
    const void* in;
    int dtype;
    uint8_t* out;
    int64_t blocks;
    const float* importance;  // one weight a column, or null; K types only
    int64_t first_column, columns;
};

struct DequantizeRun {
    const uint8_t* in;
    void* out;
    int dtype;
    int64_t blocks;
};

// sums[t] = Σ_k value k · x[t][k] over the blocks of a row, for up to 4 tokens.
struct DotRun {
    const uint8_t* in;
    int64_t blocks;
    const float* x;
    int64_t x_stride, tokens;
    float* sums;
};

using QuantizeKernel = void (*)(const QuantizeRun&);
using DequantizeKernel = void (*)(const DequantizeRun&);
using DotKernel = void (*)(const DotRun&);

struct LegacyQuantize {
    QuantizeKernel q4_0, q4_1, q5_0, q5_1, q8_0;
};

struct KQuantize {
    QuantizeKernel q4_k, q5_k, q6_k;
};

template <class Kernel>
struct OfEveryType {
    Kernel q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl;
};

using Dequantize = OfEveryType<DequantizeKernel>;
using Dot = OfEveryType<DotKernel>;

// How a type is read on the path in use; kernels are null for a type that is not known.
struct BlockType {
    DequantizeKernel dequantize;
    DotKernel dot;
    int elements, bytes;
};

BlockType block_type(int type);

extern const LegacyQuantize legacy_quantize_generic, legacy_quantize_avx2, legacy_quantize_avx512;
extern const KQuantize k_quantize_generic, k_quantize_avx2, k_quantize_avx512;
extern const Dequantize dequantize_generic, dequantize_avx2, dequantize_avx512;
extern const Dot dot_generic, dot_avx2, dot_avx512;

}  // namespace entrenar::gguf
