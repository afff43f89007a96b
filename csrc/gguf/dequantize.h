// Dequantize: one loop turns unpacked codes into values, each operation rounded to float32 as in the `gguf` package.
#pragma once

#include "gguf/unpack.h"

namespace entrenar::gguf {
namespace {

template <int kElements, int kGroup, int kOffset, bool kFifth>
inline void expand(const Unpacked& from, char* out) {
    for (int group = 0; group < kElements / kGroup; ++group) {
        const float scale = from.scale[group], minimum = from.minimum[group];
        for (int i = group * kGroup; i < (group + 1) * kGroup; i += kLanes) {
            const Ints codes = codes_at<kFifth>(from, i);
            store(out + i * 4, scale * __builtin_convertvector(codes - kOffset, Floats) - minimum);
        }
    }
}

template <void (*kUnpack)(const uint8_t*, Unpacked&), int kBytes, int kElements, int kGroup, int kOffset, bool kFifth>
struct DequantizeBlocks {
    static void run(const DequantizeRun& run) {
        Unpacked unpacked;
        alignas(64) char values[kElements * 4];
        const int64_t step = kElements * dtype_bytes(run.dtype);
        for (int64_t block = 0; block < run.blocks; ++block) {
            kUnpack(run.in + block * kBytes, unpacked);
            char* out = static_cast<char*>(run.out) + block * step;
            const bool direct = run.dtype == kFloat32;
            expand<kElements, kGroup, kOffset, kFifth>(unpacked, direct ? out : values);
            if (!direct) narrow(values, kElements, out, run.dtype);
        }
    }
};

constexpr Dequantize kDequantize = table_of<Dequantize, DequantizeBlocks>();

}  // namespace
}  // namespace entrenar::gguf
