// Size checks that run before any kernel: sums and products that cannot overflow silently.
#pragma once

#include <cstdint>

#include "errors.h"

namespace entrenar {

// a * b into *product; false if a factor is negative or the product does not fit.
static inline bool multiply(int64_t a, int64_t b, int64_t* product) {
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, product);
}

// ceil(a / b) without the overflow of a + b - 1.
static inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Error unless `buffer` holds at least `items` things of `item_bytes` bytes.
static inline int check_buffer(const void* buffer, int64_t buffer_bytes, int64_t items, int64_t item_bytes) {
    int64_t needed = 0;
    if (buffer_bytes < 0 || !multiply(items, item_bytes, &needed)) return kBadSize;
    if (needed > buffer_bytes) return kBufferTooSmall;
    return buffer == nullptr && needed > 0 ? kNullPointer : kOk;
}

}  // namespace entrenar
