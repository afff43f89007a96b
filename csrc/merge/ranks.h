// DELLA's masks (Deep et al. 2024, section 3.1): the larger |δ| is within its row, the likelier it is kept.
#pragma once

#include "common/scratch.h"
#include "merge/blocks.h"

namespace entrenar {
namespace {

constexpr int kDigitBits = 11, kDigits = 3;  // 33 bits hold a magnitude's 31

// Sorts keys (magnitude << 32 | index) by magnitude, stably; the sorted ones lie where is returned.
inline uint64_t* sorted_by_magnitude(uint64_t* keys, uint64_t* other, int64_t count) {
    uint32_t starts[kDigits][1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) {
        for (int digit = 0; digit < kDigits; ++digit) {
            ++starts[digit][(keys[i] >> (32 + digit * kDigitBits)) & ((1 << kDigitBits) - 1)];
        }
    }
    for (int digit = 0; digit < kDigits; ++digit) {
        uint32_t before = 0;
        for (uint32_t& start : starts[digit]) {
            const uint32_t here = start;
            start = before;
            before += here;
        }
        const int shift = 32 + digit * kDigitBits;
        for (int64_t i = 0; i < count; ++i) {
            other[starts[digit][(keys[i] >> shift) & ((1 << kDigitBits) - 1)]++] = keys[i];
        }
        std::swap(keys, other);
    }
    return keys;
}

bool keep_by_rank(const Operand& x, const Operand& base, int64_t rows, int64_t columns, double low, double high,
                  RandomKey key, int64_t start, uint8_t* mask) {
    auto* keys = reinterpret_cast<uint64_t*>(thread_scratch(columns * 16));
    if (keys == nullptr) return false;
    for (int64_t row = 0; row < rows; ++row) {
        const auto part = [row, columns](const Operand& whole) {
            const int64_t skip = row * columns * dtype_bytes(static_cast<int>(whole.dtype));
            return Operand{whole.data ? static_cast<const char*>(whole.data) + skip : nullptr, whole.dtype};
        };
        for_magnitudes(part(x), part(base), columns, [&](int64_t at, int64_t length, const int32_t* bits) {
            for (int64_t i = 0; i < length; ++i) {
                keys[at + i] = static_cast<uint64_t>(bits[i]) << 32 | static_cast<uint64_t>(at + i);
            }
        });
        const uint64_t* sorted = sorted_by_magnitude(keys, keys + columns, columns);
        const double last = columns > 1 ? static_cast<double>(columns - 1) : 1.0;
        for (int64_t rank = 0; rank < columns; ++rank) {
            const int64_t index = row * columns + static_cast<int64_t>(sorted[rank] & 0xFFFFFFFFu);
            const double likely = low + (high - low) * (static_cast<double>(rank) / last);
            mask[index] = static_cast<double>(random_at(key, start + index)) < likely * 4294967296.0;
        }
    }
    return true;
}

}  // namespace
}  // namespace entrenar
