// Blocks of 32 × 32 with AMX: four tiles of C, two of A, two of B. A is read where it lies.
#include <immintrin.h>

#include "matmul/matmul.h"

namespace entrenar {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Read at every block: a variable of a loaded library is otherwise found through a call. There is room for a few.
#if defined(__GLIBC__)
__attribute__((tls_model("initial-exec")))
#endif
thread_local int64_t configured_rows = 0;

// Tiles 0 to 3: C; 4 and 5: A; 6 and 7: B. A block of fewer than 32 rows has shorter tiles of A and C.
void configure(int64_t rows) {
    TileConfig config;
    const auto upper = static_cast<uint8_t>(rows < 16 ? rows : 16);
    const auto lower = static_cast<uint8_t>(rows > 16 ? rows - 16 : 16);
    const uint8_t tile_rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
        config.column_bytes[tile] = 64;
        config.rows[tile] = tile_rows[tile];
    }
    asm volatile("" ::: "memory");  // GCC 12 believes that the next line reads eight bytes of it
    _tile_loadconfig(&config);
    configured_rows = rows;
}

// Both halves of the rows (or the upper one alone) against both strips (or the left one alone).
template <bool kLower, bool kRight>
void multiply(const Run& run, int64_t offset) {
    const auto stride = static_cast<size_t>(run.a_stride);
    const char *upper = run.a, *lower = run.a + 16 * run.a_stride;
    const uint16_t* b = run.b + offset;
    for (int64_t step = 0; step < run.steps; ++step, upper += 64, lower += 64, b += kStepElements) {
        _tile_loadd(4, upper, stride);
        if constexpr (kLower) _tile_loadd(5, lower, stride);
        _tile_loadd(6, b, 64);
        if constexpr (kRight) _tile_loadd(7, b + kStepElements / 2, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kRight) _tile_dpbf16ps(1, 4, 7);
        if constexpr (kLower) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kLower && kRight) _tile_dpbf16ps(3, 5, 7);
    }
}

template <bool kLower, bool kRight>
void block_of(const Run* runs, int64_t count, int64_t offset, float* c, int64_t pitch, bool add) {
    const auto stride = static_cast<size_t>(pitch * 4);
    float* lower = c + 16 * pitch;
    if (add) {
        _tile_loadd(0, c, stride);
        if constexpr (kRight) _tile_loadd(1, c + 16, stride);
        if constexpr (kLower) _tile_loadd(2, lower, stride);
        if constexpr (kLower && kRight) _tile_loadd(3, lower + 16, stride);
    } else {
        _tile_zero(0);
        if constexpr (kRight) _tile_zero(1);
        if constexpr (kLower) _tile_zero(2);
        if constexpr (kLower && kRight) _tile_zero(3);
    }
    for (int64_t i = 0; i < count; ++i) multiply<kLower, kRight>(runs[i], offset);
    _tile_stored(0, c, stride);
    if constexpr (kRight) _tile_stored(1, c + 16, stride);
    if constexpr (kLower) _tile_stored(2, lower, stride);
    if constexpr (kLower && kRight) _tile_stored(3, lower + 16, stride);
}

void block(const Run* runs, int64_t count, int64_t rows, int64_t strips, int64_t offset, int64_t, float* c,
           int64_t pitch, bool add) {
    if (rows != configured_rows) configure(rows);
    const auto chosen = rows > 16 ? (strips > 1 ? block_of<true, true> : block_of<true, false>)
                                  : (strips > 1 ? block_of<false, true> : block_of<false, false>);
    chosen(runs, count, offset, c, pitch, add);
}

void begin() { configured_rows = 0; }
void end() { _tile_release(); }

}  // namespace

const MatmulKernel matmul_amx = {
    32, 1, block, begin, end, pack_transposed_avx512bf16, pack_pairs_avx512bf16, store_bf16_avx512bf16};

}  // namespace entrenar
