// Quantize to Q6_K: x ≈ d·s·(code − 32), for sub-blocks of 16 with 8-bit s under a float16 d.
//
// The three steps of k_affine.h without minima: the best real scale of each sub-block among codes under a range of step
// widths; d so that the largest scale is −128, s the best of the three codes around the nearest; d fitted again.
#pragma once

#include "gguf/k_tile.h"

namespace entrenar::gguf {
namespace {

using SymmetricTile = Tile<16>;

constexpr int kSymmetricWidths = 12;  // steps tried in the largest magnitude: 24 … 32.25

struct SymmetricCodes {
    float d;
    PerLane s, error;
};

inline Floats symmetric_code(Floats x, Floats inverse) {
    return nearest(smaller(larger(x * inverse, all(-32.0f)), all(31.0f)));
}

// 1 / value where its magnitude says anything.
inline Floats signed_reciprocal(Floats value) { return magnitude(value) > kTiny ? 1.0f / value : Floats{}; }

// Step 1 for the lanes from `lane`. The element of largest magnitude gets the negative end, which reaches one further.
inline void search(const SymmetricTile& tile, int lane, PerLane& scales) {
    Floats extreme{};
    for (int i = 0; i < 16; ++i) {
        const auto x = load<Floats>(&tile.x[i][lane]);
        extreme = magnitude(x) > magnitude(extreme) ? x : extreme;
    }
    const Floats per_extreme = -signed_reciprocal(extreme);
    Floats scale{}, gain{};
    for (int width = 0; width < kSymmetricWidths; ++width) {
        const Floats per_step = per_extreme * (24.0f + 0.75f * static_cast<float>(width));
        Floats wll{}, wlx{};
        for (int i = 0; i < 16; ++i) {
            const auto x = load<Floats>(&tile.x[i][lane]);
            const Floats code = symmetric_code(x, per_step), weighted = load<Floats>(&tile.weight[i][lane]) * code;
            wll = wll + weighted * code;
            wlx = wlx + weighted * x;
        }
        const Floats fit = wll > 0.0f ? wlx / wll : Floats{}, explained = fit * wlx;
        const Ints better = explained > gain;
        scale = better ? fit : scale;
        gain = better ? explained : gain;
    }
    store(&scales.at[lane], scale);
}

inline Floats weighted_error(const SymmetricTile& tile, int lane, Floats scale) {
    const Floats inverse = signed_reciprocal(scale);
    Floats sum{};
    for (int i = 0; i < 16; ++i) {
        const auto x = load<Floats>(&tile.x[i][lane]);
        const Floats off = scale * symmetric_code(x, inverse) - x;
        sum = sum + load<Floats>(&tile.weight[i][lane]) * (off * off);
    }
    return sum;
}

// Step 2: the best of s − 1, s, s + 1 in every lane.
inline void refine(const SymmetricTile& tile, int lane, SymmetricCodes& codes) {
    const auto s = load<Floats>(&codes.s.at[lane]);
    Floats best_s = s, best = weighted_error(tile, lane, codes.d * s);
    for (int step = -1; step <= 1; step += 2) {
        const Floats try_s = smaller(larger(s + static_cast<float>(step), all(-128.0f)), all(127.0f));
        const Floats error = weighted_error(tile, lane, codes.d * try_s);
        const Ints better = error < best;
        best = better ? error : best;
        best_s = better ? try_s : best_s;
    }
    store(&codes.s.at[lane], best_s);
    store(&codes.error.at[lane], best);
}

inline float storable_signed(float value) {
    const float capped = value < kLargestF16 ? value : kLargestF16;
    return round_to_f16(capped > -kLargestF16 ? capped : -kLargestF16);
}

// d from the scale of largest magnitude, and the nearest s.
inline void round_scales(const PerLane& scales, SymmetricCodes& codes) {
    float extreme = 0.0f;
    for (float scale : scales.at) extreme = __builtin_fabsf(scale) > __builtin_fabsf(extreme) ? scale : extreme;
    codes.d = storable_signed(extreme / -128.0f);
    for (int lane = 0; lane < kTileLanes; ++lane) {
        const float code = codes.d != 0.0f ? scales.at[lane] / codes.d : 0.0f;
        const float below = code < 127.0f ? code : 127.0f;
        codes.s.at[lane] = nearest(below > -128.0f ? below : -128.0f);
    }
}

// Step 3's fit of d to the codes: left as it is where nothing is coded.
inline void refit_unit(const SymmetricTile& tile, SymmetricCodes& codes) {
    PerLane wll_of, wlx_of;
    for (int lane = 0; lane < kTileLanes; lane += kLanes) {
        const Floats inverse = signed_reciprocal(codes.d * load<Floats>(&codes.s.at[lane]));
        Floats wll{}, wlx{};
        for (int i = 0; i < 16; ++i) {
            const auto x = load<Floats>(&tile.x[i][lane]);
            const Floats code = symmetric_code(x, inverse), weighted = load<Floats>(&tile.weight[i][lane]) * code;
            wll = wll + weighted * code;
            wlx = wlx + weighted * x;
        }
        store(&wll_of.at[lane], wll);
        store(&wlx_of.at[lane], wlx);
    }
    float aa = 0.0f, ax = 0.0f;
    for (int lane = 0; lane < kTileLanes; ++lane) {
        const float s = codes.s.at[lane];
        aa = aa + s * s * wll_of.at[lane];
        ax = ax + s * wlx_of.at[lane];
    }
    if (aa > 0.0f) codes.d = storable_signed(ax / aa);
}

inline float error_of(const SymmetricCodes& codes) {
    float sum = 0.0f;
    for (float error : codes.error.at) sum = sum + error;
    return sum;
}

inline void choose(const SymmetricTile& tile, SymmetricCodes& codes) {
    PerLane scales;
    for (int lane = 0; lane < kTileLanes; lane += kLanes) search(tile, lane, scales);
    round_scales(scales, codes);
    for (int lane = 0; lane < kTileLanes; lane += kLanes) refine(tile, lane, codes);
    SymmetricCodes again = codes;
    refit_unit(tile, again);
    for (int lane = 0; lane < kTileLanes; lane += kLanes) refine(tile, lane, again);
    if (error_of(again) < error_of(codes)) codes = again;
}

inline void encode(const float* x, const SymmetricCodes& codes, uint8_t* out) {
    for (int group = 0; group < 16; ++group) {
        const Floats inverse = signed_reciprocal(all(codes.d) * codes.s.at[group]);
        for (int i = group * 16; i < group * 16 + 16; i += kLanes) {
            const Floats code = symmetric_code(load<Floats>(x + i), inverse) + 32.0f;
            store_bytes(__builtin_convertvector(code, Ints), out + i);
        }
    }
}

// Halves of 128 elements: 64 bytes of low nibbles (i and i + 64), 32 bytes of high pairs (i, i + 32, i + 64, i + 96).
inline void pack_q6_k(const float* x, const SymmetricCodes& codes, uint8_t* out) {
    alignas(64) uint8_t flat[kSuperBlock];
    encode(x, codes, flat);
    for (int half = 0; half < 2; ++half) {
        const uint8_t* from = flat + half * 128;
        uint8_t *low = out + half * 64, *high = out + 128 + half * 32;
        for (int i = 0; i < 64; ++i) low[i] = static_cast<uint8_t>((from[i] & 15) | (from[i + 64] << 4));
        for (int i = 0; i < 32; ++i) {
            high[i] = static_cast<uint8_t>((from[i] >> 4) | (from[i + 32] >> 4 << 2) | (from[i + 64] >> 4 << 4) |
                                           (from[i + 96] >> 4 << 6));
        }
    }
    for (int group = 0; group < 16; ++group) {
        out[192 + group] = static_cast<uint8_t>(static_cast<int>(codes.s.at[group]));
    }
    write_f16(out + 208, codes.d);
}

void quantize_q6_k(const QuantizeRun& run) {
    alignas(64) float flat[kSuperBlock], importance[kSuperBlock];
    SymmetricTile tile;
    SymmetricCodes codes;
    for (int64_t block = 0; block < run.blocks; ++block) {
        widen(run.in, run.dtype, block * kSuperBlock, kSuperBlock, flat);
        if (run.importance) copy_importance(run, block * kSuperBlock, kSuperBlock, importance);
        fill(tile, flat, run.importance ? importance : nullptr);
        choose(tile, codes);
        pack_q6_k(flat, codes, run.out + block * 210);
    }
}

}  // namespace
}  // namespace entrenar::gguf
