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

// Elements [at, at + count) as float32.
inline void widen_block(const Operand& x, int64_t at, int64_t count, float* out) {
    if (x.data == nullptr) {
        std::fill(out, out + count, 0.0f);
        return;
    }
    const char* from = static_cast<const char*>(x.data) + at * dtype_bytes(static_cast<int>(x.dtype));
    if (x.dtype == kFloat32) {
        std::memcpy(out, from, static_cast<size_t>(count) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(out + i, x.dtype == kFloat16 ? widen_f16(from + i * 2) : widen_bf16(from + i * 2));
    }
    for (; i < count; ++i) out[i] = load_element(from, static_cast<int>(x.dtype), i);
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

// x − base of a block.
inline void delta_block(const Operand& x, const Operand& base, int64_t at, int64_t count, float* delta) {
    widen_block(x, at, count, delta);
    if (base.data == nullptr) return;
    float other[kBlock];
    widen_block(base, at, count, other);
    for (int64_t i = 0; i < count; ++i) delta[i] -= other[i];
}

// body(at, count) over blocks.
template <class Body>
inline void for_blocks(int64_t count, const Body& body) {
    for (int64_t at = 0; at < count; at += kBlock) body(at, std::min(kBlock, count - at));
}

// body(at, count, magnitude bits of δ) over blocks.
template <class Body>
inline void for_magnitudes(const Operand& x, const Operand& base, int64_t count, const Body& body) {
    for_blocks(count, [&](int64_t at, int64_t length) {
        float delta[kBlock];
        int32_t bits[kBlock];  // signed, but never negative: vectors compare signed integers
        delta_block(x, base, at, length, delta);
        std::memcpy(bits, delta, sizeof bits);
        for (int64_t i = 0; i < length; ++i) bits[i] &= 0x7FFFFFFF;
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

// Plain pointers and values: through a lambda's references a byte that is stored might be any of them.
inline int32_t count_equal(const int32_t* bits, int64_t length, int32_t limit) {
    int32_t equal = 0;
    for (int64_t i = 0; i < length; ++i) equal += bits[i] == limit;
    return equal;
}

inline void at_least(const int32_t* __restrict bits, int64_t length, int64_t least, uint8_t* __restrict top) {
    if (least > 0x7FFFFFFF) {
        std::fill(top, top + length, uint8_t{0});
        return;
    }
    const auto limit = static_cast<int32_t>(least);
    for (int64_t i = 0; i < length; ++i) top[i] = bits[i] >= limit;
}

inline void clear_where(const uint8_t* __restrict top, int64_t length, uint8_t* __restrict mask) {
    for (int64_t i = 0; i < length; ++i) mask[i] &= static_cast<uint8_t>(1 - top[i]);
}

int64_t keep_top(const Operand& x, const Operand& base, int64_t count, uint32_t threshold, int64_t ties, bool outside,
                 uint8_t* mask) {
    const auto limit = static_cast<int32_t>(threshold);
    int64_t used = 0;
    for_magnitudes(x, base, count, [&](int64_t at, int64_t length, const int32_t* bits) {
        uint8_t top[kBlock];
        const int32_t equal = count_equal(bits, length, limit);
        const bool all = used + equal <= ties;
        at_least(bits, length, static_cast<int64_t>(limit) + (all ? 0 : 1), top);
        if (!all) {
            int64_t left = std::max<int64_t>(ties - used, 0);
            for (int64_t i = 0; i < length && left > 0; ++i) {
                if (bits[i] == limit) top[i] = 1, --left;
            }
        }
        used += equal;
        if (outside) {
            clear_where(top, length, mask + at);
        } else {
            std::memcpy(mask + at, top, static_cast<size_t>(length));
        }
    });
    return std::min(used, ties);
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
    int64_t found = 0;
    for_blocks(count, [&](int64_t at, int64_t length) {
        Bits bits[kBlock] = {};
        std::memcpy(bits, from + at * static_cast<int64_t>(sizeof(Bits)), static_cast<size_t>(length) * sizeof(Bits));
        Bits here = 0;  // a block has fewer numbers than 16 bits count
        for (int64_t i = 0; i < kBlock; ++i) here += (bits[i] & exponent) == exponent;
        found += here;
    });
    return found;
}

int64_t non_finite(const Operand& x, int64_t count) {
    if (x.dtype == kFloat32) return full_exponents<uint32_t>(x.data, count, 0x7F800000u);
    return full_exponents<uint16_t>(x.data, count, x.dtype == kFloat16 ? 0x7C00 : 0x7F80);
}

void absolute_sums(const Operand& x, const Operand& base, const uint8_t* mask, int64_t count, double* sums) {
    Sums every, kept;
    for_blocks(count, [&](int64_t at, int64_t length) {
        float delta[kBlock] = {}, masked[kBlock] = {};
        delta_block(x, base, at, length, delta);
        for (int64_t i = 0; i < length; ++i) {
            delta[i] = bits_float(float_bits(delta[i]) & 0x7FFFFFFFu);
            masked[i] = mask[at + i] ? delta[i] : 0.0f;
        }
        for (int64_t i = 0; i < kBlock; i += kSums) {
            for (int j = 0; j < kSums; ++j) {
                every.lane[j] += static_cast<double>(delta[i + j]);
                kept.lane[j] += static_cast<double>(masked[i + j]);
            }
        }
    });
    sums[0] += every.total();
    sums[1] += kept.total();
}

}  // namespace
}  // namespace entrenar
