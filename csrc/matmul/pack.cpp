// A piece of a weight into a packed panel: decoded a row at a time, or straight from memory where it is bfloat16
// already.
#include <algorithm>

#include "matmul/sum.h"

namespace entrenar {
namespace {

// B is the transpose of the weight: sixteen of its rows become a strip.
void pack_transposed(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups,
                     int64_t group_elements, uint16_t* to) {
    constexpr int64_t kChunk = 512;  // sixteen rows of this fit the first cache
    alignas(64) uint16_t decoded[kStrip * kChunk];
    const Weight& source = *piece.term->source;
    const int64_t end = piece.begin + piece.steps() * kStep;
    for (int64_t strip = 0; strip < groups * 2; ++strip) {
        const int64_t row = column + strip * kStrip;
        uint16_t* at = to + strip / 2 * group_elements + strip % 2 * (kStepElements / 2);
        for (int64_t k = piece.begin; k < end; k += kChunk) {
            const int64_t count = std::min(kChunk, end - k);
            int64_t stride = 0;
            const uint16_t* rows = source.plain(row, kStrip, k, count, &stride);
            if (rows == nullptr) {
                for (int64_t r = 0; r < kStrip; ++r) source.decode(row + r, k, count, decoded + r * kChunk);
                rows = decoded;
                stride = kChunk;
            }
            for (int64_t step = 0; step < count / kStep; ++step, at += kStepElements) {
                kernel.pack_transposed(rows + step * kStep, stride, at);
            }
        }
    }
}

// B is the weight: two of its rows become a pair of every strip.
void pack_straight(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups,
                   int64_t group_elements, uint16_t* to) {
    constexpr int64_t kChunkGroups = 64;
    alignas(64) uint16_t decoded[2 * kChunkGroups * kGroup];
    const Weight& source = *piece.term->source;
    for (int64_t first = 0; first < groups; first += kChunkGroups, to += kChunkGroups * group_elements) {
        const int64_t many = std::min(kChunkGroups, groups - first), count = many * kGroup;
        for (int64_t pair = 0; pair < piece.steps() * (kStep / 2); ++pair) {
            const int64_t k = piece.begin + pair * 2;
            int64_t stride = 0;
            const uint16_t* rows = source.plain(k, 2, column + first * kGroup, count, &stride);
            if (rows == nullptr) {
                source.decode(k, column + first * kGroup, count, decoded);
                source.decode(k + 1, column + first * kGroup, count, decoded + count);
                rows = decoded;
                stride = count;
            }
            kernel.pack_pairs(rows, rows + stride, many, group_elements,
                              to + pair / 16 * kStepElements + pair % 16 * 2 * kStrip);
        }
    }
}

}  // namespace

void pack_piece(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups, int64_t group_elements,
                uint16_t* to) {
    (piece.term->transposed ? pack_transposed : pack_straight)(kernel, piece, column, groups, group_elements, to);
}

}  // namespace entrenar
