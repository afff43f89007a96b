// What the K quantizers share: sub-blocks side by side in lanes.
//
// A K type cuts its 256 elements into sub-blocks (8 of 32, or 16 of 16) with a scale each, found by search. 16
// sub-blocks stand in a tile, transposed: element i of all of them is one vector, so that the whole search runs in all
// lanes at once and no sum crosses a lane. A lane's result does not depend on its neighbours or on the vector's width.
#pragma once

#include "gguf/blocks.h"
#include "gguf/lanes.h"

namespace entrenar::gguf {
namespace {

constexpr int kTileLanes = 16;
constexpr float kTiny = 1e-30f;  // a spread below this is none: float16 scales end at 6e-8
constexpr float kLargestF16 = 65504.0f;

template <int kElements>
struct Tile {
    alignas(64) float x[kElements][kTileLanes];
    alignas(64) float weight[kElements][kTileLanes];
};

// One float a sub-block.
struct alignas(64) PerLane {
    float at[kTileLanes];
};

inline Floats square_root(Floats value) {
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
}

inline Floats reciprocal_above(Floats value, float least) { return value > least ? 1.0f / value : Floats{}; }

// `flat`: the tile's sub-blocks one after another. The weight of an element in the error to be minimised is
// rms + |x|, times the importance of its column where there is one.
template <int kElements>
inline void fill(Tile<kElements>& tile, const float* flat, const float* importance) {
    for (int lane = 0; lane < kTileLanes; ++lane) {
        for (int i = 0; i < kElements; ++i) tile.x[i][lane] = flat[lane * kElements + i];
    }
    if (importance) {
        for (int lane = 0; lane < kTileLanes; ++lane) {
            for (int i = 0; i < kElements; ++i) tile.weight[i][lane] = importance[lane * kElements + i];
        }
    }
    for (int lane = 0; lane < kTileLanes; lane += kLanes) {
        Floats sum{};
        for (int i = 0; i < kElements; ++i) {
            const auto x = load<Floats>(&tile.x[i][lane]);
            sum = sum + x * x;
        }
        const Floats rms = square_root(sum * (1.0f / kElements));
        for (int i = 0; i < kElements; ++i) {
            Floats weight = rms + magnitude(load<Floats>(&tile.x[i][lane]));
            if (importance) weight = weight * load<Floats>(&tile.weight[i][lane]);
            store(&tile.weight[i][lane], weight);
        }
    }
}

// The importance of the columns of `count` elements from `first`, columns repeating at the end of each row.
inline void copy_importance(const QuantizeRun& run, int64_t first, int count, float* to) {
    for (int done = 0; done < count; done += kSuperBlock) {
        const int64_t column = (run.first_column + first + done) % run.columns;
        std::memcpy(to + done, run.importance + column, kSuperBlock * 4);
    }
}

}  // namespace
}  // namespace entrenar::gguf
