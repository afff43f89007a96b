// Blocks of floats → 4-bit codes of the nearest of sixteen codebook entries, even element in the high nibble.
#pragma once

#include <cstdint>

namespace entrenar {

// bitsandbytes' guard against division by zero (ops/codebook/quantize.py's TINY).
constexpr float kTiny = 1e-38f;

// [-1, 1] in 32 buckets of nearly equal width; any x that is finite and rounds into it falls in 0 … 31. It never falls
// as x rises, and that is all the search below relies on.
constexpr float kBucketsPerUnit = 15.9f, kBucketCentre = 16.0f;

// A codebook made ready for the search: the nearest entry of x is order[number of midpoints below x].
struct Nearest {
    float midpoints[16];  // ascending; the 16th is unused
    uint8_t order[16];    // code of the i-th smallest entry
    uint8_t zero;         // code of 0, which fills the spare nibble of an odd count
    // Where no bucket holds two midpoints, one comparison finds the entry: codes[2·bucket + (x > threshold[bucket])].
    bool bucketed;
    float threshold[32];
    uint8_t codes[64];
};

struct QuantizeCodebook {
    // `blocks` whole blocks: absmax[b] = max |in|, codes of in · (1 / max(absmax, tiny)). block_size is a multiple
    // of 16.
    void (*blocks)(const void* in, int dtype, const Nearest& nearest, int64_t block_size, int64_t blocks,
                   uint8_t* codes, void* absmax);
};

extern const QuantizeCodebook quantize_codebook_generic, quantize_codebook_avx2, quantize_codebook_avx512;

}  // namespace entrenar
