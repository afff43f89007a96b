// Quantize to Q4_K and Q5_K: x ≈ d·s·code − dmin·m, for sub-blocks of 32 with 6-bit s and m under float16 d and dmin.
//
// 1. For each sub-block the best real scale and minimum: codes under a range of step widths, the weighted least-squares
//    fit to each, the one that explains most.
// 2. d and dmin so that the largest scale and minimum are 63; s and m the best of the 3×3 codes around the nearest.
// 3. d and dmin fitted again to the codes, s and m chosen again; kept where the error fell.
#pragma once

#include "gguf/k_tile.h"

namespace entrenar::gguf {
namespace {

using AffineTile = Tile<32>;

constexpr int kTopScale = 63;
constexpr int kStepWidths = 13;     // step widths tried: spread / (top code − 2 … top code + 1)
constexpr float kSingular = 1e-4f;  // a least-squares determinant below this share of its terms is noise

// A fit and how much of the error it removes.
struct AffineFit {
    Floats scale, offset, gain;
};

// Weighted least squares of y ≈ scale·code + offset, given the sums over a sub-block. Where the offset would put the
// minimum above zero, which the format cannot store, or the codes are all equal: the fit through `ceiling`.
inline AffineFit fit_affine(Floats w, Floats wy, Floats wl, Floats wll, Floats wly, Floats ceiling) {
    const Floats determinant = w * wll - wl * wl;
    const Floats inverse = 1.0f / determinant;
    Floats scale = (w * wly - wy * wl) * inverse;
    Floats offset = (wll * wy - wl * wly) * inverse;
    const Ints usable = (determinant > kSingular * (w * wll)) & (offset < ceiling);
    offset = usable ? offset : ceiling;
    const Floats through = wll > 0.0f ? (wly - ceiling * wl) / wll : Floats{};
    scale = usable ? scale : through;
    const Floats gain = scale * (2.0f * wly - scale * wll - 2.0f * offset * wl) + offset * (2.0f * wy - offset * w);
    return {scale, offset, gain};
}

// Step 1 for the lanes from `lane`: scale ≥ 0 and minimum ≥ 0 (to be subtracted).
template <int kTop>
inline void search(const AffineTile& tile, int lane, PerLane& scales, PerLane& minima) {
    Floats low{}, high = load<Floats>(&tile.x[0][lane]);
    for (int i = 0; i < 32; ++i) {
        low = smaller(load<Floats>(&tile.x[i][lane]), low);
        high = larger(load<Floats>(&tile.x[i][lane]), high);
    }
    // Against `low` as origin: far from zero, sums of x itself would cancel.
    alignas(64) float y[32][kLanes];
    Floats w{}, wy{};
    for (int i = 0; i < 32; ++i) {
        const Floats shifted = load<Floats>(&tile.x[i][lane]) - low, weight = load<Floats>(&tile.weight[i][lane]);
        store(y[i], shifted);
        w = w + weight;
        wy = wy + weight * shifted;
    }
    const Floats per_spread = reciprocal_above(high - low, kTiny), ceiling = -low;
    const Floats mean = smaller(wy / w, ceiling);
    AffineFit best{Floats{}, mean, mean * (2.0f * wy - mean * w)};  // one value for all, to be improved on
    for (int width = 0; width < kStepWidths; ++width) {
        const Floats per_step = per_spread * (kTop - 2 + 0.25f * static_cast<float>(width));
        Floats wl{}, wll{}, wly{};
        for (int i = 0; i < 32; ++i) {
            const auto shifted = load<Floats>(y[i]);
            const Floats code = nearest(smaller(shifted * per_step, all(kTop)));
            const Floats weighted = load<Floats>(&tile.weight[i][lane]) * code;
            wl = wl + weighted;
            wll = wll + weighted * code;
            wly = wly + weighted * shifted;
        }
        const AffineFit fit = fit_affine(w, wy, wl, wll, wly, ceiling);
        const Ints better = (fit.gain > best.gain) & (fit.scale > 0.0f);
        best.scale = better ? fit.scale : best.scale;
        best.offset = better ? fit.offset : best.offset;
        best.gain = better ? fit.gain : best.gain;
    }
    store(&scales.at[lane], best.scale);
    store(&minima.at[lane], larger(-(low + best.offset), Floats{}));
}

// A tile's state: d and dmin (equal in the 8 lanes of a super-block), s and m as floats, and the weighted error.
struct AffineCodes {
    PerLane d, dmin, s, m, error;
};

// The code of x under a decoded scale and minimum: the same arithmetic decides and packs.
template <int kTop>
inline Floats affine_code(Floats x, Floats inverse, Floats minimum) {
    return nearest(smaller(larger((x + minimum) * inverse, Floats{}), all(kTop)));
}

template <int kTop>
inline Floats weighted_error(const AffineTile& tile, int lane, Floats scale, Floats minimum) {
    const Floats inverse = reciprocal_above(scale, kTiny);
    Floats sum{};
    for (int i = 0; i < 32; ++i) {
        const auto x = load<Floats>(&tile.x[i][lane]);
        const Floats off = scale * affine_code<kTop>(x, inverse, minimum) - minimum - x;
        sum = sum + load<Floats>(&tile.weight[i][lane]) * (off * off);
    }
    return sum;
}

inline Floats clamp_scale(Floats code) { return smaller(larger(code, Floats{}), all(kTopScale)); }

// Step 2: the best of the codes around s and m under the d and dmin in `codes`.
template <int kTop>
inline void refine(const AffineTile& tile, int lane, AffineCodes& codes) {
    const auto d = load<Floats>(&codes.d.at[lane]), dmin = load<Floats>(&codes.dmin.at[lane]);
    const auto s = load<Floats>(&codes.s.at[lane]), m = load<Floats>(&codes.m.at[lane]);
    Floats best_s = s, best_m = m, best = weighted_error<kTop>(tile, lane, d * s, dmin * m);
    for (int trial = 0; trial < 9; ++trial) {
        if (trial == 4) continue;  // s and m themselves
        const Floats try_s = clamp_scale(s + static_cast<float>(trial / 3 - 1));
        const Floats try_m = clamp_scale(m + static_cast<float>(trial % 3 - 1));
        const Floats error = weighted_error<kTop>(tile, lane, d * try_s, dmin * try_m);
        const Ints better = error < best;
        best = better ? error : best;
        best_s = better ? try_s : best_s;
        best_m = better ? try_m : best_m;
    }
    store(&codes.s.at[lane], best_s);
    store(&codes.m.at[lane], best_m);
    store(&codes.error.at[lane], best);
}

// The five sums over each sub-block that the fit of d and dmin needs.
struct AffineSums {
    PerLane w, wx, wl, wll, wlx;
};

template <int kTop>
inline void sum_codes(const AffineTile& tile, int lane, const AffineCodes& codes, AffineSums& sums) {
    const Floats scale = load<Floats>(&codes.d.at[lane]) * load<Floats>(&codes.s.at[lane]);
    const Floats minimum = load<Floats>(&codes.dmin.at[lane]) * load<Floats>(&codes.m.at[lane]);
    const Floats inverse = reciprocal_above(scale, kTiny);
    Floats w{}, wx{}, wl{}, wll{}, wlx{};
    for (int i = 0; i < 32; ++i) {
        const auto x = load<Floats>(&tile.x[i][lane]), weight = load<Floats>(&tile.weight[i][lane]);
        const Floats code = affine_code<kTop>(x, inverse, minimum), weighted = weight * code;
        w = w + weight;
        wx = wx + weight * x;
        wl = wl + weighted;
        wll = wll + weighted * code;
        wlx = wlx + weighted * x;
    }
    store(&sums.w.at[lane], w);
    store(&sums.wx.at[lane], wx);
    store(&sums.wl.at[lane], wl);
    store(&sums.wll.at[lane], wll);
    store(&sums.wlx.at[lane], wlx);
}

inline float storable(float value) { return round_to_f16(value < kLargestF16 ? value : kLargestF16); }

inline float top_of(const float* values) {
    float top = 0.0f;
    for (int i = 0; i < 8; ++i) top = values[i] > top ? values[i] : top;
    return top;
}

inline float scale_code(float value, float unit) {
    const float code = unit > 0.0f ? value / unit : 0.0f;
    return nearest(code < kTopScale ? code : kTopScale);
}

// The 8 lanes of one super-block, from `first`: d, dmin and the nearest s and m.
inline void round_scales(const PerLane& scales, const PerLane& minima, int first, AffineCodes& codes) {
    const float d = storable(top_of(scales.at + first) / kTopScale);
    const float dmin = storable(top_of(minima.at + first) / kTopScale);
    for (int lane = first; lane < first + 8; ++lane) {
        codes.d.at[lane] = d;
        codes.dmin.at[lane] = dmin;
        codes.s.at[lane] = scale_code(scales.at[lane], d);
        codes.m.at[lane] = scale_code(minima.at[lane], dmin);
    }
}

// Step 3's fit: x ≈ d·(s·code) − dmin·m over a super-block; left as they are where the equations are singular.
inline void refit_units(const AffineSums& sums, int first, AffineCodes& codes) {
    float aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int lane = first; lane < first + 8; ++lane) {
        const float s = codes.s.at[lane], m = codes.m.at[lane];
        aa = aa + s * s * sums.wll.at[lane];
        ab = ab + s * m * sums.wl.at[lane];
        bb = bb + m * m * sums.w.at[lane];
        ax = ax + s * sums.wlx.at[lane];
        bx = bx + m * sums.wx.at[lane];
    }
    const float determinant = aa * bb - ab * ab;
    float d = codes.d.at[first], dmin = codes.dmin.at[first];
    if (bb > 0.0f ? determinant > kSingular * (aa * bb) : aa > 0.0f) {
        d = bb > 0.0f ? (bb * ax - ab * bx) / determinant : ax / aa;
        dmin = bb > 0.0f ? (ab * ax - aa * bx) / determinant : 0.0f;
    }
    const bool valid = d > 0.0f && dmin >= 0.0f;
    for (int lane = first; valid && lane < first + 8; ++lane) {
        codes.d.at[lane] = storable(d);
        codes.dmin.at[lane] = storable(dmin);
    }
}

inline float error_of(const AffineCodes& codes, int first) {
    float sum = 0.0f;
    for (int lane = first; lane < first + 8; ++lane) sum = sum + codes.error.at[lane];
    return sum;
}

inline void copy_lanes(const AffineCodes& from, int first, AffineCodes& to) {
    for (int lane = first; lane < first + 8; ++lane) {
        to.d.at[lane] = from.d.at[lane];
        to.dmin.at[lane] = from.dmin.at[lane];
        to.s.at[lane] = from.s.at[lane];
        to.m.at[lane] = from.m.at[lane];
    }
}

template <int kTop>
inline void choose(const AffineTile& tile, AffineCodes& codes) {
    PerLane scales, minima;
    for (int lane = 0; lane < kTileLanes; lane += kLanes) search<kTop>(tile, lane, scales, minima);
    for (int first = 0; first < kTileLanes; first += 8) round_scales(scales, minima, first, codes);
    for (int lane = 0; lane < kTileLanes; lane += kLanes) refine<kTop>(tile, lane, codes);
    AffineSums sums;
    for (int lane = 0; lane < kTileLanes; lane += kLanes) sum_codes<kTop>(tile, lane, codes, sums);
    AffineCodes again = codes;
    for (int first = 0; first < kTileLanes; first += 8) refit_units(sums, first, again);
    for (int lane = 0; lane < kTileLanes; lane += kLanes) refine<kTop>(tile, lane, again);
    for (int first = 0; first < kTileLanes; first += 8) {
        if (error_of(again, first) < error_of(codes, first)) copy_lanes(again, first, codes);
    }
}

inline void pack_scales(const AffineCodes& codes, int first, uint8_t* out) {
    for (int group = 0; group < 4; ++group) {
        const auto s = static_cast<int>(codes.s.at[first + group]), m = static_cast<int>(codes.m.at[first + group]);
        const auto s_next = static_cast<int>(codes.s.at[first + group + 4]);
        const auto m_next = static_cast<int>(codes.m.at[first + group + 4]);
        out[group] = static_cast<uint8_t>(s | (s_next >> 4 << 6));
        out[group + 4] = static_cast<uint8_t>(m | (m_next >> 4 << 6));
        out[group + 8] = static_cast<uint8_t>((s_next & 15) | ((m_next & 15) << 4));
    }
}

// The codes of one super-block, in its elements' order.
template <int kTop>
inline void encode(const float* x, const AffineCodes& codes, int first, uint8_t* out) {
    for (int group = 0; group < 8; ++group) {
        const Floats scale = all(codes.d.at[first + group]) * codes.s.at[first + group];
        const Floats minimum = all(codes.dmin.at[first + group]) * codes.m.at[first + group];
        const Floats inverse = reciprocal_above(scale, kTiny);
        for (int i = group * 32; i < group * 32 + 32; i += kLanes) {
            const Floats code = affine_code<kTop>(load<Floats>(x + i), inverse, minimum);
            store_bytes(__builtin_convertvector(code, Ints), out + i);
        }
    }
}

template <int kTop>
inline void pack_affine(const float* x, const AffineCodes& codes, int first, uint8_t* out) {
    alignas(64) uint8_t flat[kSuperBlock];
    encode<kTop>(x, codes, first, flat);
    write_f16(out, codes.d.at[first]);
    write_f16(out + 2, codes.dmin.at[first]);
    pack_scales(codes, first, out + 4);
    uint8_t* nibbles = out + (kTop == 31 ? 48 : 16);
    for (int part = 0; part < 4; ++part) {
        const uint8_t* low = flat + part * 64;
        for (int i = 0; i < 32; ++i) nibbles[part * 32 + i] = static_cast<uint8_t>((low[i] & 15) | (low[i + 32] << 4));
    }
    for (int i = 0; kTop == 31 && i < 32; ++i) {
        int bits = 0;
        for (int part = 0; part < 8; ++part) bits |= (flat[part * 32 + i] >> 4) << part;
        out[16 + i] = static_cast<uint8_t>(bits);
    }
}

// Two super-blocks fill a tile; an odd last one shares it with zeros.
template <int kTop>
void quantize_affine(const QuantizeRun& run) {
    constexpr int kBlockBytes = kTop == 31 ? 176 : 144;
    alignas(64) float flat[2 * kSuperBlock], importance[2 * kSuperBlock] = {};
    AffineTile tile;
    AffineCodes codes;
    for (int64_t block = 0; block < run.blocks; block += 2) {
        const int here = run.blocks - block < 2 ? 1 : 2;
        if (here == 1) std::memset(flat + kSuperBlock, 0, kSuperBlock * 4);
        widen(run.in, run.dtype, block * kSuperBlock, here * kSuperBlock, flat);
        if (run.importance) copy_importance(run, block * kSuperBlock, here * kSuperBlock, importance);
        fill(tile, flat, run.importance ? importance : nullptr);
        choose<kTop>(tile, codes);
        for (int i = 0; i < here; ++i) {
            pack_affine<kTop>(flat + i * kSuperBlock, codes, i * 8, run.out + (block + i) * kBlockBytes);
        }
    }
}

}  // namespace
}  // namespace entrenar::gguf
