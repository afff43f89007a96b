// The elementwise kernels of a transformer layer and the cross-entropy over its logits: one table a path.
//
// Written once over vectors (rms_norm.h, rotary.h, gated_activation.h, cross_entropy.h), compiled by
// elementwise_<path>.cpp. All compute in float32 and round once. A row is computed by one thread in one order, so
// results do not depend on the number of threads; between paths they differ by the order and the fusing of operations.
#pragma once

#include <cstdint>

namespace entrenar {

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };  // ops/elementwise/gated_activation.py's KINDS
static inline bool is_activation(int kind) { return kind >= kSilu && kind <= kGeluTanh; }

enum Function : int { kExp = 0, kTanh = 1, kNormalCumulative = 2 };  // what entrenar_function computes

// Prepared weights, coefficients and scratch are padded to whole pairs of vectors, at most this many elements.
constexpr int64_t kLargestPair = 32;

constexpr int64_t kPanelColumns = 256;

struct RmsNormRows {
    const void* x;  // (rows, columns)
    int64_t rows, columns;
    float eps;
    int dtype;
};

struct Rotation {
    const void *x, *cos, *sin;              // x (batch, tokens, heads, width) with the strides below
    void* out;                              // contiguous
    int64_t tokens, heads, width, rotated;  // the first `rotated` of `width` elements turn, the rest is copied
    int64_t batch_stride, token_stride, head_stride;  // of x, in elements
    int64_t cos_batches;                              // cos and sin are (cos_batches, tokens, rotated)
    int dtype, cos_dtype;
    bool transpose;
};

struct Elementwise {
    // RMS norm. `weight` is prepared: float32 with the offset added, in the order of dtype's pairs, padded.
    void (*prepare_weight)(const void* weight, int weight_dtype, int64_t columns, float offset, int dtype,
                           float* prepared);
    void (*rms_norm)(const RmsNormRows& rows, const float* weight, void* out);
    // `added` (rows, columns), if not null, is added to dx before it is rounded.
    void (*rms_norm_backward)(const RmsNormRows& rows, const float* weight, const void* grad, const void* added,
                              void* dx);
    // 1 / √(mean(x²) + eps) of each row.
    void (*reciprocal_norms)(const RmsNormRows& rows, float* out);
    // Σ over rows of grad · x · reciprocal, for up to kPanelColumns columns from `begin` on.
    void (*rms_norm_backward_weight)(const RmsNormRows& rows, const float* reciprocals, const void* grad, int64_t begin,
                                     int64_t count, void* dweight, int weight_dtype);

    // Positions [begin, end) of batch · tokens.
    void (*rotate)(const Rotation& rotation, int64_t begin, int64_t end);

    void (*gated)(const void* gate, const void* up, int64_t count, int kind, void* out, int dtype);
    void (*gated_backward)(const void* grad, const void* gate, const void* up, int64_t count, int kind, void* dgate,
                           void* dup, int dtype);

    // One row: returns the loss of `label`; `scratch` (cross_entropy_scratch(columns) floats), if not null, asks for
    // the gradient over the logits.
    float (*cross_entropy)(void* logits, int64_t columns, int64_t label, float softcap, int dtype, float* scratch);

    void (*function)(const void* in, int64_t count, int which, void* out);
};

// Elements that the logits of one tile have; a tile stays in the first level of cache.
constexpr int64_t kTileLogits = 2048;

// Floats of scratch for a row: its values and one maximum a tile.
static inline int64_t cross_entropy_scratch(int64_t columns) {
    return columns + kLargestPair + columns / kTileLogits + 1;
}

extern const Elementwise elementwise_generic, elementwise_avx2, elementwise_avx512;

// Error unless cos and sin (cos_batches, tokens, rotated) of cos_dtype turn heads of `width` in `batch` rows.
int check_turns(const void* cos, int64_t cos_bytes, const void* sin, int64_t sin_bytes, int64_t batch, int64_t tokens,
                int64_t width, int64_t rotated, int64_t cos_batches, int cos_dtype);

// The table of the path in use.
const Elementwise& elementwise();

// What other groups are made of; the exported functions of the same names do nothing else.
int rms_norm(const void* x, int64_t x_bytes, const void* weight, int64_t weight_bytes, void* out, int64_t out_bytes,
             int64_t rows, int64_t columns, float eps, float offset, int dtype, int weight_dtype, int threads);
int rms_norm_backward(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes, const void* weight,
                      int64_t weight_bytes, const void* added, int64_t added_bytes, void* dx, int64_t dx_bytes,
                      int64_t rows, int64_t columns, float eps, float offset, int dtype, int weight_dtype, int threads);
int gated_activation(const void* gate, int64_t gate_bytes, const void* up, int64_t up_bytes, void* out,
                     int64_t out_bytes, int64_t count, int kind, int dtype, int threads);
int gated_activation_backward(const void* grad, int64_t grad_bytes, const void* gate, int64_t gate_bytes,
                              const void* up, int64_t up_bytes, void* dgate, int64_t dgate_bytes, void* dup,
                              int64_t dup_bytes, int64_t count, int kind, int dtype, int threads);
int rotary(const void* x, int64_t x_bytes, const void* cos, int64_t cos_bytes, const void* sin, int64_t sin_bytes,
           void* out, int64_t out_bytes, int64_t batch, int64_t tokens, int64_t heads, int64_t width, int64_t rotated,
           int64_t batch_stride, int64_t token_stride, int64_t head_stride, int64_t cos_batches, int dtype,
           int cos_dtype, int transpose, int threads);

}  // namespace entrenar
