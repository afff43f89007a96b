// Blocks of elements that stay in the first level of cache: widen, subtract, round; and what is counted over them.
#pragma once

#include <algorithm>

#include "common/floats.h"
#include "common/lanes.h"
#include "common/pairs.h"
#include "merge/merge.h"

namespace entrenar {
namespace {

constexpr int64_t kBlock = 256;

template <int kDtype>
inline void widen_block(const char* from, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(out + i, kDtype == kFloat16 ? widen_f16(from + i * 2) : widen_bf16(from + i * 2));
    }
    for (; i < count; ++i) out[i] = load_element(from, kDtype, i);
}

// Elements [at, at + count) as float32, and zeros up to the end of the block: its place need not be cleared before,
// which for a few blocks costs more than what is done with them.
inline void widen_block(const Operand& x, int64_t at, int64_t count, float* out) {
    std::fill(out + (x.data == nullptr ? 0 : count), out + kBlock, 0.0f);
    if (x.data == nullptr) return;
    const char* from = static_cast<const char*>(x.data) + at * dtype_bytes(static_cast<int>(x.dtype));
    if (x.dtype == kFloat32) std::memcpy(out, from, static_cast<size_t>(count) * 4);
    if (x.dtype == kFloat16) widen_block<kFloat16>(from, count, out);
    if (x.dtype == kBfloat16) widen_block<kBfloat16>(from, count, out);
}

inline void round_block(const float* values, int64_t count, void* out, int dtype, int64_t at) {
    char* to = static_cast<char*>(out) + at * dtype_bytes(dtype);
    if (dtype == kFloat32) {
        std::memcpy(to, values, static_cast<size_t>(count) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = load<Floats>(values + i);
        dtype == kFloat16 ? narrow_f16(value, to + i * 2) : narrow_bf16(value, to + i * 2);
    }
    for (; i < count; ++i) store_element(to, dtype, i, values[i]);
}

inline void round_block(const double* values, int64_t count, void* out, int dtype, int64_t at) {
    float narrow[kBlock];
    for (int64_t i = 0; i < count; ++i) narrow[i] = static_cast<float>(values[i]);
    round_block(narrow, count, out, dtype, at);
}

// x − base of a block, zeros behind its end.
inline void delta_block(const Operand& x, const Operand& base, int64_t at, int64_t count, float* delta) {
    widen_block(x, at, count, delta);
    if (base.data == nullptr) return;
    alignas(64) float other[kBlock];
    widen_block(base, at, count, other);
    for (int64_t i = 0; i < kBlock; ++i) delta[i] -= other[i];
}

// body(at, count) over blocks.
template <class Body>
inline void for_blocks(int64_t count, const Body& body) {
    for (int64_t at = 0; at < count; at += kBlock) body(at, std::min(kBlock, count - at));
}

// body(at, count, magnitude bits of δ) over blocks; behind the last one's end the bits are −1, which no magnitude has.
template <class Body>
inline void for_magnitudes(const Operand& x, const Operand& base, int64_t count, const Body& body) {
    for_blocks(count, [&](int64_t at, int64_t length) {
        alignas(64) float delta[kBlock];
        alignas(64) int32_t bits[kBlock];  // signed, but never negative: vectors compare signed integers
        delta_block(x, base, at, length, delta);
        for (int64_t i = 0; i < kBlock; i += kLanes) store(bits + i, load<Ints>(delta + i) & 0x7FFFFFFF);
        std::fill(bits + length, bits + kBlock, -1);
        body(at, length, bits);
    });
}

void histogram(const Operand& x, const Operand& base, int64_t count, int64_t prefix, int64_t* counts) {
    for_magnitudes(x, base, count, [&](int64_t, int64_t length, const int32_t* bits) {
        if (prefix < 0) {
            int64_t* const odd = counts + kUpperBins;
            int64_t i = 0;
            for (; i + 2 <= length; i += 2) {
                ++counts[bits[i] >> 16];
                ++odd[bits[i + 1] >> 16];
            }
            if (i < length) ++counts[bits[i] >> 16];
            return;
        }
        const auto wanted = static_cast<int32_t>(prefix);
        for (int64_t i = 0; i < length; i += 32) {
            const int64_t end = std::min(i + 32, length);
            int32_t any = 0;
            for (int64_t j = i; j < end; ++j) any |= (bits[j] >> 16) == wanted;
            if (!any) continue;
            for (int64_t j = i; j < end; ++j) {
                if (bits[j] >> 16 == wanted) ++counts[(j % 2) * kLowerBins + (bits[j] & 0xFFFF)];
            }
        }
    });
}

// How many lanes of a block are true of `condition`, a function of one vector.
template <class Condition>
ENTRENAR_INLINE inline int64_t count_lanes(const int32_t* bits, const Condition& condition) {
    Ints counts{};
    for (int64_t i = 0; i < kBlock; i += kLanes) counts -= condition(load<Ints>(bits + i));
    int64_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += counts[lane];
    return total;
}

// Writes the numbers from `first` to `last` of a block, and up to a vector more behind them; how many there are.
inline int64_t pick_between(const int32_t* __restrict bits, int32_t first, int32_t last, int32_t* __restrict out) {
    int64_t written = 0;
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi32(first), high = _mm512_set1_epi32(last);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        const __m512i values = load<__m512i>(bits + i);
        const __mmask16 inside = _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(values, low), values, high);
        store(out + written, _mm512_maskz_compress_epi32(inside, values));
        written += __builtin_popcount(inside);
    }
#else
    for (int64_t i = 0; i < kBlock; ++i) {
        out[written] = bits[i];
        written += static_cast<int>(bits[i] >= first) & static_cast<int>(bits[i] <= last);
    }
#endif
    return written;
}

void between(const Operand& x, const Operand& base, int64_t count, int32_t first, int32_t last, int32_t* out,
             int64_t room, int64_t* counts) {
    for_magnitudes(x, base, count, [&](int64_t, int64_t, const int32_t* bits) {
        int32_t inside[kBlock + kLanes];
        const int64_t here = pick_between(bits, first, last, inside);
        const int64_t fitting = std::min(here, std::max<int64_t>(room - counts[1], 0));
        if (fitting > 0) std::memcpy(out + counts[1], inside, static_cast<size_t>(fitting) * 4);
        counts[0] += count_lanes(bits, [last](Ints lanes) ENTRENAR_INLINE { return lanes > last; });
        counts[1] += here;
    });
}

// top[i] = whether the bits of a whole block are `least` or more.
inline void at_least(const int32_t* __restrict bits, int32_t least, uint8_t* __restrict top) {
    for (int64_t i = 0; i < kBlock; i += kLanes) store_bytes((load<Ints>(bits + i) >= least) & 1, top + i);
}

// top[i] = whether the bits of a block are above `limit`, or equal to it and among the first `ties` of those; how many
// of those there were.
inline int64_t top_of_block(const int32_t* bits, int32_t limit, int64_t ties, uint8_t* top) {
    if (ties <= 0 && limit < 0x7FFFFFFF) {
        at_least(bits, limit + 1, top);
        return 0;
    }
    const int64_t equal = count_lanes(bits, [limit](Ints lanes) ENTRENAR_INLINE { return lanes == limit; });
    at_least(bits, limit, top);
    if (equal <= ties) return equal;
    int64_t left = ties;
    for (int64_t i = 0; i < kBlock; ++i) {
        if (bits[i] == limit) top[i] = left-- > 0;
    }
    return ties;
}

inline void clear_where(const uint8_t* __restrict top, int64_t length, uint8_t* __restrict mask) {
    for (int64_t i = 0; i < length; ++i) mask[i] &= static_cast<uint8_t>(1 - top[i]);
}

int64_t keep_top(const Operand& x, const Operand& base, int64_t count, uint32_t threshold, int64_t ties, bool outside,
                 uint8_t* mask) {
    const auto limit = static_cast<int32_t>(threshold);
    int64_t left = ties;
    for_magnitudes(x, base, count, [&](int64_t at, int64_t length, const int32_t* bits) {
        alignas(64) uint8_t here[kBlock];
        uint8_t* const top = outside || length < kBlock ? here : mask + at;
        left -= top_of_block(bits, limit, left, top);
        if (outside) clear_where(top, length, mask + at);
        if (!outside && length < kBlock) std::memcpy(mask + at, top, static_cast<size_t>(length));
    });
    return ties - left;
}

// MurmurHash3's 32-bit finaliser (Appleby): every bit of the input reaches every bit of the output.
inline uint32_t mixed(uint32_t value) {
    value = (value ^ (value >> 16)) * 0x85EBCA6Bu;
    value = (value ^ (value >> 13)) * 0xC2B2AE35u;
    return value ^ (value >> 16);
}

inline uint32_t random_at(RandomKey key, int64_t index) {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
    return mixed(mixed(static_cast<uint32_t>(index) ^ key.first) + key.second + high * 0x9E3779B9u);
}

void keep_random(RandomKey key, int64_t start, int64_t count, int64_t limit, uint8_t* mask) {
    if (limit <= 0) {
        std::fill(mask, mask + count, uint8_t{0});
        return;
    }
    const auto last = static_cast<uint32_t>(std::min<int64_t>(limit, int64_t{1} << 32) - 1);
    for_blocks(count, [&](int64_t at, int64_t length) {
        const int64_t first = start + at;
        const auto high = static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32);
        if (high != static_cast<uint32_t>(static_cast<uint64_t>(first + length) >> 32)) {
            for (int64_t i = 0; i < length; ++i) mask[at + i] = random_at(key, first + i) <= last;
            return;
        }
        const auto low = static_cast<uint32_t>(first);
        const uint32_t second = key.second + high * 0x9E3779B9u;
        for (uint32_t i = 0; i < static_cast<uint32_t>(length); ++i) {
            mask[at + i] = mixed(mixed((low + i) ^ key.first) + second) <= last;
        }
    });
}

// Float64 sums in a fixed number of lanes, so that their order does not depend on the width of vectors.
constexpr int kSums = 16;

struct Sums {
    double lane[kSums] = {};

    double total() const {
        double sum = 0;
        for (double value : lane) sum += value;
        return sum;
    }
};

// How many of the numbers have every bit of `exponent`: infinities and NaNs. Nothing is widened, the bits say it.
template <class Bits>
int64_t full_exponents(const void* data, int64_t count, Bits exponent) {
    const char* from = static_cast<const char*>(data);
    int64_t total = 0;
    for_blocks(count, [&](int64_t at, int64_t length) {
        const char* const block = from + at * static_cast<int64_t>(sizeof(Bits));
        Bits here = 0;  // a block has fewer numbers than 16 bits count
        for (int64_t i = 0; i < length; ++i) here += (load<Bits>(block + i * sizeof(Bits)) & exponent) == exponent;
        total += here;
    });
    return total;
}

int64_t non_finite(const Operand& x, int64_t count) {
    if (x.dtype == kFloat32) return full_exponents<uint32_t>(x.data, count, 0x7F800000u);
    return full_exponents<uint16_t>(x.data, count, x.dtype == kFloat16 ? 0x7C00 : 0x7F80);
}

void absolute_sums(const Operand& x, const Operand& base, const uint8_t* mask, int64_t count, double* sums) {
    Sums every, selected;
    for_blocks(count, [&](int64_t at, int64_t length) {
        float delta[kBlock], masked[kBlock];
        delta_block(x, base, at, length, delta);
        std::fill(masked + length, masked + kBlock, 0.0f);
        for (int64_t i = 0; i < length; ++i) {
            delta[i] = bits_float(float_bits(delta[i]) & 0x7FFFFFFFu);
            masked[i] = mask[at + i] ? delta[i] : 0.0f;
        }
        for (int64_t i = 0; i < kBlock; i += kSums) {
            for (int j = 0; j < kSums; ++j) {
                every.lane[j] += static_cast<double>(delta[i + j]);
                selected.lane[j] += static_cast<double>(masked[i + j]);
            }
        }
    });
    sums[0] += every.total();
    sums[1] += selected.total();
}

}  // namespace
}  // namespace entrenar
