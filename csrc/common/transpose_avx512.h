// The transpose of a matrix that fills the registers. Static, as everything that is compiled under ISA flags.
#pragma once

#include <immintrin.h>

namespace entrenar {

// A 16 × 16 matrix of dwords → its transpose, in place.
static inline void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4q + j] holds, in lane l, column 4l + j of rows 4q … 4q + 3: gather lanes over q.
    for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                      low23 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD),
                      high23 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
        t[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
        t[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace entrenar
