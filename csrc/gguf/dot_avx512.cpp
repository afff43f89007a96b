// The dot products, compiled for the avx512 path. Where all of a type's codes are nibbles, the 16 values they can have
// in a group are one vector, made once for the group: a look-up takes the place of unpacking, widening and scaling.
#include "gguf/dot.h"

namespace entrenar::gguf {
namespace {

template <int kTokens>
struct NibbleSums {
    Floats low[kTokens] = {}, high[kTokens] = {};

    // 16 bytes: the low nibbles are elements that meet x_low, the high ones those that meet x_high.
    void add(const uint8_t* packed, Floats low_values, Floats high_values, const float* x_low, const float* x_high,
             int64_t x_stride) {
        const __m512i codes = _mm512_cvtepu8_epi32(load<__m128i>(packed));
        const Floats first = _mm512_permutexvar_ps(codes, low_values);  // looks at the lowest four bits alone
        const Floats second = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), high_values);
        for (int t = 0; t < kTokens; ++t) {
            low[t] = fused(first, load<Floats>(x_low + t * x_stride), low[t]);
            high[t] = fused(second, load<Floats>(x_high + t * x_stride), high[t]);
        }
    }
};

inline Floats counting() {
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<float>(lane);
    return values;
}

struct Q4_0 {
    static constexpr int kBytes = 18, kElements = 32;

    template <int kTokens>
    static void add(const uint8_t* block, const float* x, int64_t x_stride, NibbleSums<kTokens>& sums) {
        const Floats values = (counting() - 8.0f) * all(read_f16(block));
        sums.add(block + 2, values, values, x, x + 16, x_stride);
    }
};

struct Q4_1 {
    static constexpr int kBytes = 20, kElements = 32;

    template <int kTokens>
    static void add(const uint8_t* block, const float* x, int64_t x_stride, NibbleSums<kTokens>& sums) {
        const Floats values = fused(counting(), all(read_f16(block)), all(read_f16(block + 2)));
        sums.add(block + 4, values, values, x, x + 16, x_stride);
    }
};

struct Iq4Nl {
    static constexpr int kBytes = 18, kElements = 32;

    template <int kTokens>
    static void add(const uint8_t* block, const float* x, int64_t x_stride, NibbleSums<kTokens>& sums) {
        const Floats values = __builtin_convertvector(load_bytes(kNonLinear), Floats) * all(read_f16(block));
        sums.add(block + 2, values, values, x, x + 16, x_stride);
    }
};

struct Q4_K {
    static constexpr int kBytes = 144, kElements = 256;

    template <int kTokens>
    static void add(const uint8_t* block, const float* x, int64_t x_stride, NibbleSums<kTokens>& sums) {
        Unpacked scales;
        unpack_scales(block, scales);
        const auto values = [&](int group) {
            return fused(counting(), all(scales.scale[group]), all(-scales.minimum[group]));
        };
        for (int part = 0; part < 4; ++part) {
            const Floats low = values(2 * part), high = values(2 * part + 1);
            for (int i = 0; i < 32; i += 16) {
                const float* from = x + 64 * part + i;
                sums.add(block + 16 + 32 * part + i, low, high, from, from + 32, x_stride);
            }
        }
    }
};

template <class Block>
struct DotNibbles {
    template <int kTokens>
    static void run_tokens(const DotRun& run) {
        NibbleSums<kTokens> sums;
        for (int64_t block = 0; block < run.blocks; ++block) {
            const uint8_t* in = run.in + block * Block::kBytes;
            for (int i = 0; i < Block::kBytes; i += 64) fetch_ahead(in + i);
            Block::template add<kTokens>(in, run.x + block * Block::kElements, run.x_stride, sums);
        }
        for (int t = 0; t < kTokens; ++t) run.sums[t] = sum(sums.low[t] + sums.high[t]);
    }
};

constexpr Dot with_nibbles() {
    Dot table = kDot;
    table.q4_0 = dot_with<DotNibbles<Q4_0>>;
    table.q4_1 = dot_with<DotNibbles<Q4_1>>;
    table.q4_k = dot_with<DotNibbles<Q4_K>>;
    table.iq4_nl = dot_with<DotNibbles<Iq4Nl>>;
    return table;
}

}  // namespace

const Dot dot_avx512 = with_nibbles();

}  // namespace entrenar::gguf
