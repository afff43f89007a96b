// Blocks of floats → 4-bit codes and a scale of either sign, both chosen so that the block's squared error is small, an
// element's error counting by its magnitude w = |x| / max|x|: a large weight's error is worse than its square says.
//
// For a scale s the best codes are the nearest entries of x / s; for given codes c the best scale is Σwxc / Σwcc (least
// squares), and the error is then Σwxx − (Σwxc)² / Σwcc. So every candidate scale is tried, the codes that belong to it
// are found, and the one with the largest (Σwxc)² / Σwcc is kept, with its least-squares scale; one more step from
// there.
#pragma once

#include <cstdint>

namespace entrenar {

// Candidates: these shares of the block's largest magnitude, with either sign. A negative scale turns the codebook
// around: NF4 has eight entries above 0 and seven below.
constexpr int kShares = 3;
constexpr float kShare[kShares] = {0.84f, 0.94f, 1.04f};
// Sums run in this many lanes and are then added pairwise: all paths, and the reference, give the same bits.
constexpr int kSumLanes = 8;

// The vector paths keep a block of up to this size as float32; larger ones go the generic way.
constexpr int64_t kLargestBlock = 4096;

// The best scale of a block and its gain, as far as candidates have been considered.
struct Best {
    float gain, scale;
};

// As bits: 2⁻¹⁰⁰, below which squares would underflow and a block counts as zeros; and infinity.
constexpr uint32_t kSmallest = 27u << 23, kInfinity = 0x7F800000u;

// The codebook sorted, and what lies half-way between neighbours.
struct SearchTable {
    float values[16];     // ascending
    float midpoints[16];  // the 16th is unused
    uint8_t order[16];    // code of the i-th smallest entry
};

struct SearchCodebook {
    // `blocks` whole blocks; block_size is a multiple of 16. A block with a value that is not finite, and one of
    // (nearly) zeros, gets its largest magnitude as its scale.
    void (*blocks)(const void* in, int dtype, const SearchTable& table, int64_t block_size, int64_t blocks,
                   uint8_t* codes, void* scales);
};

extern const SearchCodebook search_codebook_generic, search_codebook_avx2, search_codebook_avx512;

}  // namespace entrenar
