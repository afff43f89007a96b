// The search for scales in portable C++.
#include "codebook4/search.h"
#include "common/floats.h"

namespace entrenar {
namespace {

int position(const SearchTable& table, float value) {
    int below = 0;
    for (int step = 8; step; step /= 2) below += table.midpoints[below + step - 1] >= value ? 0 : step;
    return below;
}

float pairwise(const float* lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Σwxc and Σwcc for the codes nearest to x · reciprocal; w = |x| · per_largest.
void fit(const void* in, int dtype, const SearchTable& table, int64_t first, int64_t size, float per_largest,
         float reciprocal, float* xc, float* cc) {
    float products[kSumLanes] = {}, squares[kSumLanes] = {};
    for (int64_t i = 0; i < size; ++i) {
        const float x = load_element(in, dtype, first + i);
        const float c = table.values[position(table, x * reciprocal)];
        const float weighted = __builtin_fabsf(x) * per_largest * c;
        products[i % kSumLanes] += x * weighted;
        squares[i % kSumLanes] += c * weighted;
    }
    *xc = pairwise(products);
    *cc = pairwise(squares);
}

float search(const void* in, int dtype, const SearchTable& table, int64_t first, int64_t size, float largest) {
    const float per_largest = 1.0f / largest;
    float best = -1.0f, scale = largest, xc = 0.0f, cc = 0.0f;
    const auto consider = [&](float candidate) {
        fit(in, dtype, table, first, size, per_largest, 1.0f / candidate, &xc, &cc);
        const float gain = xc * xc / cc;
        if (gain > best) {
            best = gain;
            scale = xc / cc;
        }
    };
    for (int share = 0; share < kShares; ++share) {
        consider(largest * kShare[share]);
        consider(-(largest * kShare[share]));
    }
    consider(scale);
    return scale;
}

void search_blocks(const void* in, int dtype, const SearchTable& table, int64_t block_size, int64_t blocks,
                   uint8_t* codes, void* scales) {
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block_size;
        uint32_t largest = 0;
        for (int64_t i = first; i < first + block_size; ++i) {
            const uint32_t magnitude = float_bits(load_element(in, dtype, i)) & 0x7FFFFFFFu;
            if (magnitude > largest) largest = magnitude;
        }
        float scale = bits_float(largest);
        if (largest >= kSmallest && largest < kInfinity) scale = search(in, dtype, table, first, block_size, scale);
        store_element(scales, kFloat32, b, scale);
        const float reciprocal = largest >= kSmallest ? 1.0f / scale : 0.0f;
        for (int64_t i = first; i < first + block_size; i += 2) {
            const uint8_t even = table.order[position(table, load_element(in, dtype, i) * reciprocal)];
            const uint8_t odd = table.order[position(table, load_element(in, dtype, i + 1) * reciprocal)];
            codes[i / 2] = static_cast<uint8_t>(even << 4 | odd);
        }
    }
}

}  // namespace

const SearchCodebook search_codebook_generic = {search_blocks};

}  // namespace entrenar
