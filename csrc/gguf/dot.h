// Dot products of blocks with up to 4 tokens: codes turn into float32 values on their way into the sum.
#pragma once

#include "common/prefetch.h"
#include "common/tokens.h"
#include "gguf/unpack.h"

namespace entrenar::gguf {
namespace {

template <class Kernel>
void dot_with(const DotRun& run) {
    for_tokens(run.tokens, [&](auto count) { Kernel::template run_tokens<count>(run); });
}

template <void (*kUnpack)(const uint8_t*, Unpacked&), int kBytes, int kElements, int kGroup, int kOffset, bool kFifth>
struct DotBlocks {
    // Two sums a token: one would wait for itself.
    template <int kTokens>
    struct Sums {
        Floats even[kTokens] = {}, odd[kTokens] = {};
    };

    // The offset joins the minimum: code · scale + base.
    static Floats values(const Unpacked& from, const float* base, int first) {
        const int group = first / kGroup;
        const Floats codes = __builtin_convertvector(codes_at<kFifth>(from, first), Floats);
        return fused(codes, all(from.scale[group]), all(base[group]));
    }

    template <int kTokens>
    static void add_block(const Unpacked& from, const float* x, int64_t x_stride, Sums<kTokens>& sums) {
        constexpr int kGroups = kElements / kGroup;
        constexpr float kFrom = kOffset;
        float base[16];
        if constexpr (kGroups % kLanes == 0) {
            for (int group = 0; group < kGroups; group += kLanes) {
                const auto scale = load<Floats>(from.scale + group), minimum = load<Floats>(from.minimum + group);
                store(base + group, -(scale * kFrom + minimum));
            }
        } else {
            for (int i = 0; i < kGroups; ++i) base[i] = -(from.scale[i] * kFrom + from.minimum[i]);
        }
        for (int i = 0; i < kElements; i += 2 * kLanes) {
            const Floats first = values(from, base, i), second = values(from, base, i + kLanes);
            for (int t = 0; t < kTokens; ++t) {
                const float* token = x + t * x_stride + i;
                sums.even[t] = fused(first, load<Floats>(token), sums.even[t]);
                sums.odd[t] = fused(second, load<Floats>(token + kLanes), sums.odd[t]);
            }
        }
    }

    template <int kTokens>
    static void run_tokens(const DotRun& run) {
        Unpacked unpacked;
        Sums<kTokens> sums;
        for (int64_t block = 0; block < run.blocks; ++block) {
            for (int i = 0; i < kBytes; i += 64) fetch_ahead(run.in + block * kBytes + i);
            kUnpack(run.in + block * kBytes, unpacked);
            add_block<kTokens>(unpacked, run.x + block * kElements, run.x_stride, sums);
        }
        for (int t = 0; t < kTokens; ++t) run.sums[t] = sum(sums.even[t] + sums.odd[t]);
    }

    static void run(const DotRun& run) { dot_with<DotBlocks>(run); }
};

constexpr Dot kDot = table_of<Dot, DotBlocks>();

}  // namespace
}  // namespace entrenar::gguf
