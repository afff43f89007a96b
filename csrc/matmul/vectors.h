// The products over float vectors, for CPUs without bfloat16 ones: written once, compiled per path.
//
// A dword of a packed strip holds a pair of one column; as float32 its lower half is the dword shifted up and its upper
// half the dword without the lower. A's rows are widened once for all strips of a block.
#pragma once

#include <cstring>
#include <utility>

#include "common/lanes.h"
#include "matmul/matmul.h"

namespace entrenar {
namespace {

constexpr int kVectors = kStrip / kLanes;
constexpr int kRows = 12 / kVectors;   // twelve sums, of sixteen registers
constexpr int64_t kGroups = 8;         // so many share the widened rows of A
constexpr int64_t kChunk = 8 * kStep;  // of the inner dimension; a strip of so much stays in the first cache

// c (kTokens, kStrip) += a (kTokens rows of kChunk) · steps of a strip; `next` is the strip to come, which is asked for
// meanwhile: a panel is larger than the second cache of some CPUs.
template <int kTokens>
void multiply(const float* a, const uint16_t* strip, const uint16_t* next, int64_t steps, float* c, int64_t pitch) {
    Floats sums[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[t][v] = load<Floats>(c + t * pitch + v * kLanes);
    }
    for (int64_t step = 0; step < steps; ++step, strip += kStepElements, next += kStepElements) {
        const uint16_t* b = strip;
        for (int pair = 0; pair < kStep / 2; ++pair, b += 2 * kStrip, a += 2) {
            __builtin_prefetch(next + pair * 2 * kStrip);
            for (int half = 0; half < 2; ++half) {
                Floats columns[kVectors];
                for (int v = 0; v < kVectors; ++v) {
                    const Words both = load<Words>(b + 2 * v * kLanes);
                    columns[v] = (Floats)(half ? both & 0xFFFF0000u : both << 16);
                }
                for (int t = 0; t < kTokens; ++t) {
                    const Floats token = all(a[t * kChunk + half]);
                    for (int v = 0; v < kVectors; ++v) sums[t][v] = fused(token, columns[v], sums[t][v]);
                }
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) store(c + t * pitch + v * kLanes, sums[t][v]);
    }
}

using Multiply = decltype(&multiply<1>);

template <int... kTokens>
inline Multiply choose(int64_t rows, std::integer_sequence<int, kTokens...>) {
    static constexpr Multiply by_rows[] = {multiply<kTokens + 1>...};
    return by_rows[rows - 1];
}

inline void widen_rows(const char* rows, int64_t stride, int64_t count, int64_t elements, float* to) {
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t k = 0; k < elements; k += kLanes)
            store(to + r * kChunk + k, widen_bf16(rows + r * stride + k * 2));
    }
}

void block(const Run* runs, int64_t count, int64_t rows, int64_t strips, int64_t offset, int64_t group_elements,
           float* c, int64_t pitch, bool add) {
    alignas(64) float widened[kRows * kChunk];
    const Multiply chosen = choose(rows, std::make_integer_sequence<int, kRows>());
    for (int64_t r = 0; r < rows && !add; ++r) std::memset(c + r * pitch, 0, static_cast<size_t>(strips * kStrip) * 4);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t step = 0; step < runs[i].steps; step += kChunk / kStep) {
            const int64_t steps = smaller(kChunk / kStep, runs[i].steps - step);
            widen_rows(runs[i].a + step * kStep * 2, runs[i].a_stride, rows, steps * kStep, widened);
            const uint16_t* b = runs[i].b + offset + step * kStepElements;
            const auto strip_at = [=](int64_t strip) {
                return b + strip / 2 * group_elements + strip % 2 * (kStepElements / 2);
            };
            for (int64_t strip = 0; strip < strips; ++strip) {
                const uint16_t* next = strip + 1 < strips ? strip_at(strip + 1) : b + steps * kStepElements;
                chosen(widened, strip_at(strip), next, steps, c + strip * kStrip, pitch);
            }
        }
    }
}

void nothing() {}

typedef uint32_t Four __attribute__((vector_size(16)));

// A 4 × 4 matrix of dwords → its transpose; strides of their rows in bfloat16.
inline void transpose4(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride) {
    const Four a = load<Four>(from), b = load<Four>(from + stride), c = load<Four>(from + 2 * stride),
               d = load<Four>(from + 3 * stride);
    for (int i = 0; i < 4; ++i) store(to + i * to_stride, Four{a[i], b[i], c[i], d[i]});
}

void pack_transposed(const uint16_t* rows, int64_t stride, uint16_t* strip) {
    for (int64_t row = 0; row < kStrip; row += 4) {
        for (int64_t pair = 0; pair < kStep / 2; pair += 4) {
            transpose4(rows + row * stride + pair * 2, stride, strip + pair * 2 * kStrip + row * 2, 2 * kStrip);
        }
    }
}

void pack_pairs(const uint16_t* first, const uint16_t* second, int64_t groups, int64_t group_elements, uint16_t* pair) {
    for (int64_t group = 0; group < groups; ++group, pair += group_elements) {
        for (int64_t column = 0; column < kGroup; column += kLanes, first += kLanes, second += kLanes) {
            const Words lower = __builtin_convertvector(load<Halves>(first), Words);
            const Words upper = __builtin_convertvector(load<Halves>(second), Words);
            store(pair + column / kStrip * (kStepElements / 2) + column % kStrip * 2, lower | upper << 16);
        }
    }
}

void store_row(const float* c, float alpha, const uint16_t* bias, const uint16_t* residual, int64_t count,
               uint16_t* out) {
    const auto bytes = [](const uint16_t* from, int64_t i) { return reinterpret_cast<const char*>(from + i); };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Floats values = load<Floats>(c + i) * all(alpha);
        if (bias != nullptr) values += widen_bf16(bytes(bias, i));
        if (residual != nullptr) values += widen_bf16(bytes(residual, i));
        narrow_bf16(values, reinterpret_cast<char*>(out + i));
    }
    for (; i < count; ++i) {
        float value = load_element(c, kFloat32, i) * alpha;
        if (bias != nullptr) value += load_element(bias, kBfloat16, i);
        if (residual != nullptr) value += load_element(residual, kBfloat16, i);
        store_element(out, kBfloat16, i, value);
    }
}

void store_bf16(const Bf16Block& to, const float* c, int64_t pitch, float alpha) {
    for (int64_t row = 0; row < to.rows; ++row) {
        const int64_t at = row * to.stride;
        store_row(c + row * pitch, alpha, to.bias, to.residual ? to.residual + at : nullptr, to.columns, to.out + at);
    }
}

constexpr MatmulKernel kVectorProducts = {kRows,   kGroups,         block,      nothing,
                                          nothing, pack_transposed, pack_pairs, store_bf16};

}  // namespace
}  // namespace entrenar
