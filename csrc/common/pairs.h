// Rows of any dtype, two vectors at a time, for kernels that treat every element alike.
//
// A pair holds 2·kLanes consecutive elements in the order of its dtype: for bfloat16 the even ones in one vector and
// the odd ones in the other, which one shift and one mask take apart and put together; else the first half and the
// second. Tensors of one dtype then agree on the lane of an element; what meets another dtype is put in its order.
#pragma once

#include "common/lanes.h"
#include "common/prefetch.h"

// For lambdas: two calls of one (whole pairs, the rest of a row) must not keep its constants out of registers.
#define ENTRENAR_INLINE __attribute__((always_inline))

namespace entrenar {
namespace {

constexpr int kPair = 2 * kLanes;

struct Pair {
    Floats a, b;
};

template <int kDtype>
constexpr int64_t kBytes = kDtype == kFloat32 ? 4 : 2;

// A count of elements that fills whole pairs.
constexpr int64_t padded(int64_t count) { return (count + kPair - 1) / kPair * kPair; }

// Where element `index` of a row is among floats that were stored pair by pair.
template <int kDtype>
inline int64_t place_of(int64_t index) {
    if constexpr (kDtype != kBfloat16) return index;
    return index / kPair * kPair + (index % 2) * kLanes + index % kPair / 2;
}

template <int kDtype>
inline Pair load_pair(const void* from) {
    const char* bytes = static_cast<const char*>(from);
    if constexpr (kDtype == kFloat32) return {load<Floats>(bytes), load<Floats>(bytes + kLanes * 4)};
    if constexpr (kDtype == kFloat16) return {widen_f16(bytes), widen_f16(bytes + kLanes * 2)};
    const Words both = load<Words>(bytes);
    return {(Floats)(both << 16), (Floats)(both & 0xFFFF0000u)};
}

template <int kDtype>
inline void store_pair(void* to, const Pair& pair) {
    char* bytes = static_cast<char*>(to);
    if constexpr (kDtype == kFloat32) {
        store(bytes, pair.a);
        store(bytes + kLanes * 4, pair.b);
    } else if constexpr (kDtype == kFloat16) {
        narrow_f16(pair.a, bytes);
        narrow_f16(pair.b, bytes + kLanes * 2);
    } else {
        store(bytes, (rounded_bf16(pair.a) >> 16) | (rounded_bf16(pair.b) & 0xFFFF0000u));
    }
}

// The first `count` elements of a pair; in place of the others `fill`.
template <int kDtype>
inline Pair load_part(const void* from, int64_t count, float fill) {
    char whole[kPair * kBytes<kDtype>];
    for (int i = 0; i < kPair; ++i) store_element(whole, kDtype, i, fill);
    std::memcpy(whole, from, static_cast<size_t>(count * kBytes<kDtype>));
    return load_pair<kDtype>(whole);
}

template <int kDtype>
inline void store_part(void* to, int64_t count, const Pair& pair) {
    char whole[kPair * kBytes<kDtype>];
    store_pair<kDtype>(whole, pair);
    std::memcpy(to, whole, static_cast<size_t>(count * kBytes<kDtype>));
}

// body(at, pairs of every input, pairs of every output) over `count` elements from kIn rows to kOut rows; in the last
// pair the inputs end with `fill`.
template <int kDtype, int kIn, int kOut, class Body>
ENTRENAR_INLINE inline void map_pairs(const void* const* in, void* const* out, int64_t count, float fill,
                                      const Body& body) {
    const auto source = [=](int i, int64_t at) { return static_cast<const char*>(in[i]) + at * kBytes<kDtype>; };
    const auto target = [=](int i, int64_t at) { return static_cast<char*>(out[i]) + at * kBytes<kDtype>; };
    Pair from[kIn ? kIn : 1], to[kOut ? kOut : 1];
    int64_t at = 0;
    for (; at + kPair <= count; at += kPair) {
        for (int i = 0; i < kIn && at * kBytes<kDtype> % 64 == 0; ++i) fetch_ahead(source(i, at));
        for (int i = 0; i < kIn; ++i) from[i] = load_pair<kDtype>(source(i, at));
        body(at, from, to);
        for (int i = 0; i < kOut; ++i) store_pair<kDtype>(target(i, at), to[i]);
    }
    if (at == count) return;
    for (int i = 0; i < kIn; ++i) from[i] = load_part<kDtype>(source(i, at), count - at, fill);
    body(at, from, to);
    for (int i = 0; i < kOut; ++i) store_part<kDtype>(target(i, at), count - at, to[i]);
}

// A pair of floats held in that order, or in any order that both sides agree on.
inline Pair load_floats(const float* from) { return {load<Floats>(from), load<Floats>(from + kLanes)}; }

inline void store_floats(float* to, const Pair& pair) {
    store(to, pair.a);
    store(to + kLanes, pair.b);
}

// `count` floats of dtype kFrom as float32 in the order of kDtype's pairs; zeros fill the last pair of `out`.
template <int kFrom, int kDtype>
inline void widen_in_order(const void* in, int64_t count, float* out) {
    map_pairs<kFrom, 1, 0>(&in, nullptr, count, 0.0f, [=](int64_t at, const Pair* from, Pair*) ENTRENAR_INLINE {
        store_floats(out + at, from[0]);
        if constexpr ((kFrom == kBfloat16) != (kDtype == kBfloat16)) {
            float pair[kPair];
            std::memcpy(pair, out + at, sizeof pair);
            for (int i = 0; i < kPair; ++i) out[at + place_of<kDtype>(i)] = pair[place_of<kFrom>(i)];
        }
    });
}

template <int kDtype>
inline void widen_in_order(const void* in, int in_dtype, int64_t first, int64_t count, float* out) {
    const auto chosen = in_dtype == kFloat32   ? widen_in_order<kFloat32, kDtype>
                        : in_dtype == kFloat16 ? widen_in_order<kFloat16, kDtype>
                                               : widen_in_order<kBfloat16, kDtype>;
    chosen(static_cast<const char*>(in) + first * dtype_bytes(in_dtype), count, out);
}

// kernel<kDtype>(arguments…) for a dtype known at run time.
#define ENTRENAR_FOR_DTYPE(dtype, kernel, ...)             \
    ((dtype) == kFloat32   ? kernel<kFloat32>(__VA_ARGS__) \
     : (dtype) == kFloat16 ? kernel<kFloat16>(__VA_ARGS__) \
                           : kernel<kBfloat16>(__VA_ARGS__))

}  // namespace
}  // namespace entrenar
