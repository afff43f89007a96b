// Everything that crosses the boundary to Python: the structures, the exported functions, and who may change them.
//
// This is the only place where they are declared. Every file that defines or fills one includes it, so that a
// definition that differs does not compile; src/entrenar/native/abi.py says the same in ctypes, and abi.cpp tells the
// layout as this library was built with it: Python compares the two when it loads the library, and does not use one
// that differs.
//
// A buffer is an address and its bytes; addresses may be unaligned. Every function returns 0 or a code of
// common/errors.h unless something else is said.
#pragma once

#include <cstdint>

#include "common/errors.h"

#define ENTRENAR_API extern "C" __attribute__((visibility("default")))

namespace entrenar {

// Buffers as the caller gives them; pointers may be unaligned. group null: `values` are float32. map null: `linear`.
struct ScaleBuffers {
    const void* values;
    int64_t values_bytes;
    const void* group;
    int64_t group_bytes;
    const void* offset;
    int64_t offset_bytes;
    const void* map;
    int64_t map_bytes;
};

enum class SourceKind : int32_t { dense = 0, codebook4 = 1, gguf = 3, int8 = 4 };

// A caller's weight (rows, columns), as ops/linear/multiply.py fills it in; a stack is made here alone. Pointers may be
// unaligned.
struct SourceView {
    int32_t kind;
    int32_t dtype;  // dense: of its elements, float32 or bfloat16; gguf: ggml's type id
    int64_t rows, columns;
    int64_t stride;  // dense: elements from row to row
    float scale;     // dense: every element is multiplied by it
    int32_t unused;
    int64_t block_size;  // codebook4, int8
    const void* data;    // dense: elements; codebook4: packed codes; int8: codes; gguf: blocks
    int64_t data_bytes;
    ScaleBuffers scales;   // codebook4, int8
    const void* codebook;  // codebook4
    int64_t codebook_bytes;
};

// One product of the sum, as ops/linear/multiply.py passes it: A (rows, inner) bfloat16, rows `a_stride` elements
// apart.
struct TermView {
    const void* a;
    int64_t a_bytes, a_stride, inner;
    int32_t transposed, unused;
    SourceView source;
};

// One layer. A (r, I) and B (O, r) are dense or, for rank 0, absent.
struct MemberView {
    SourceView weight, a, b;
    const void* bias;  // (O,) bfloat16 or null
    int64_t bias_bytes;
    void* y;  // forward: the result (M, O); backward: its gradient; bfloat16
    int64_t y_bytes;
    void* da;  // (r, I) float32
    int64_t da_bytes;
    void* db;  // (O, r) float32
    int64_t db_bytes;
    int64_t rank;
    float scale;
    int32_t unused;
};

struct GroupView {
    const void* x;  // (M, I) bfloat16
    int64_t x_bytes;
    void* dx;  // (M, I) bfloat16, or null where nobody wants it
    int64_t dx_bytes;
    const void* residual;  // (M, O) bfloat16, added to the only member's result, or null
    int64_t residual_bytes;
    void* u;  // x·Aᵀ of all members and zeros behind it, hidden_elements() bfloat16: a forward writes it, a backward
              // reads it; null: it is computed again, in scratch
    int64_t u_bytes;
    int64_t tokens, inner, count;
    const MemberView* members;
};

// A (B, T, heads, D) tensor with D contiguous; strides in elements.
struct HeadsView {
    const void* data;
    int64_t bytes, batch, token, head;

    const uint16_t* rows(int64_t b, int64_t h) const {
        return static_cast<const uint16_t*>(data) + b * batch + h * head;
    }
};

// What ops/attention.py passes. A token attends the keys from starts[b][t] to itself; or, where starts holds three
// numbers a token, from the first of them, but for the keys from the second up to the third.
struct AttentionView {
    int64_t batch, tokens, heads, kv_heads, width;
    const void* starts;  // (B, T) int32, never falling along T, or (B, T, 3), as starts_bytes say; null: 0
    int64_t starts_bytes;
    float scale;
    int32_t unused;
    HeadsView q, k, v;
};

struct BufferView {
    void* data;  // null: not there
    int64_t bytes;
};

// An RMS norm's weight, (columns,) of `dtype`; data null where there is no norm.
struct NormView {
    const void* weight;
    int64_t bytes;
    int32_t dtype;
    float eps, offset;
    int32_t unused;
};

// Forward: `out` is the result, and what of x, gate, up, product, u and down_u (of gate and up, and of down) has a
// buffer is saved there for the backward. Backward: `out` is the gradient of the result, `dh` that of h; what was not
// saved is computed again.
struct MlpBlockView {
    int64_t tokens, hidden, inner;
    NormView norm;
    BufferView h, x, gate, up, product, u, down_u, out, dh;
    MemberView members[3];  // gate, up, down
    int32_t activation, unused;
};

// Forward: `out` is the result, and what of x, q, k, v, o, lse, u and output_u (of q, k and v, and of output) has a
// buffer is saved there for the backward. Backward: `out` is the gradient of the result, `dh` that of h; what was not
// saved is computed again. q and k are saved rotated, or, where they have norms, as they came from their layers.
struct AttentionBlockView {
    int64_t batch, tokens, hidden, heads, kv_heads, width;
    NormView norm, q_norm, k_norm;
    BufferView h, x, q, k, v, o, lse, u, output_u, out, dh;  // lse (B, H, T) float32
    BufferView cos, sin;  // (rotary_batches, T, rotated) of rotary_dtype; null: no rotation
    int64_t rotary_batches, rotated;
    BufferView starts;      // as in AttentionView
    MemberView members[4];  // q, k, v, output
    float scale;
    int32_t rotary_dtype;
};

// Runs body(data) on `threads` threads at once: GOMP_parallel of torch's OpenMP runtime.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

}  // namespace entrenar

ENTRENAR_API int entrenar_adapted(const entrenar::GroupView* view, int threads);
ENTRENAR_API int entrenar_adapted_backward(const entrenar::GroupView* view, int threads);
ENTRENAR_API int entrenar_attention_backward(const entrenar::AttentionView* view, const void* out, int64_t out_bytes,
                                             const void* grad, int64_t grad_bytes, const void* lse, int64_t lse_bytes,
                                             void* dq, int64_t dq_bytes, void* dk, int64_t dk_bytes, void* dv,
                                             int64_t dv_bytes, int threads);
ENTRENAR_API int entrenar_attention(const entrenar::AttentionView* view, void* out, int64_t out_bytes, void* lse,
                                    int64_t lse_bytes, int threads);
ENTRENAR_API int entrenar_attention_block(const entrenar::AttentionBlockView* view, int threads);
ENTRENAR_API int entrenar_attention_block_backward(const entrenar::AttentionBlockView* view, int threads);
ENTRENAR_API int entrenar_attention_inputs(const entrenar::AttentionBlockView* view, int threads);
ENTRENAR_API int entrenar_mlp_block(const entrenar::MlpBlockView* view, int threads);
ENTRENAR_API int entrenar_mlp_block_backward(const entrenar::MlpBlockView* view, int threads);
ENTRENAR_API int entrenar_dequantize_codebook(const void* packed, int64_t packed_bytes, const void* scales,
                                              int64_t scales_bytes, const void* group, int64_t group_bytes,
                                              const void* offset, int64_t offset_bytes, const void* map,
                                              int64_t map_bytes, const void* codebook, int64_t codebook_bytes,
                                              void* out, int64_t out_bytes, int64_t count, int64_t block_size,
                                              int dtype, int threads);
ENTRENAR_API int entrenar_dequantize_codebook_panel(const void* packed, int64_t packed_bytes, const void* scales,
                                                    int64_t scales_bytes, const void* group, int64_t group_bytes,
                                                    const void* offset, int64_t offset_bytes, const void* map,
                                                    int64_t map_bytes, const void* codebook, int64_t codebook_bytes,
                                                    void* out, int64_t out_bytes, int64_t count, int64_t columns,
                                                    int64_t row, int64_t panel_rows, int64_t column,
                                                    int64_t panel_columns, int64_t block_size, int dtype, int threads);
ENTRENAR_API int entrenar_quantize_codebook(const void* in, int64_t in_bytes, const void* codebook,
                                            int64_t codebook_bytes, void* codes, int64_t codes_bytes, void* absmax,
                                            int64_t absmax_bytes, int64_t count, int64_t block_size, int dtype,
                                            int threads);
ENTRENAR_API int entrenar_search_codebook(const void* in, int64_t in_bytes, const void* codebook,
                                          int64_t codebook_bytes, void* codes, int64_t codes_bytes, void* scales,
                                          int64_t scales_bytes, int64_t count, int64_t block_size, int dtype,
                                          int threads);
ENTRENAR_API const char* entrenar_path();
ENTRENAR_API int entrenar_set_path(const char* name);
ENTRENAR_API int entrenar_keep_freed_memory();
ENTRENAR_API void entrenar_use_huge_pages();
ENTRENAR_API void entrenar_use_gomp(entrenar::GompParallel parallel);
ENTRENAR_API int entrenar_scratch(int64_t bytes, void** address);
ENTRENAR_API int entrenar_cross_entropy(void* logits, int64_t logits_bytes, const void* labels, int64_t labels_bytes,
                                        void* losses, int64_t losses_bytes, int64_t rows, int64_t columns,
                                        float softcap, int gradient, int dtype, int threads);
ENTRENAR_API int entrenar_function(const void* in, int64_t in_bytes, void* out, int64_t out_bytes, int64_t count,
                                   int which);
ENTRENAR_API int entrenar_gated_activation(const void* gate, int64_t gate_bytes, const void* up, int64_t up_bytes,
                                           void* out, int64_t out_bytes, int64_t count, int kind, int dtype,
                                           int threads);
ENTRENAR_API int entrenar_gated_activation_backward(const void* grad, int64_t grad_bytes, const void* gate,
                                                    int64_t gate_bytes, const void* up, int64_t up_bytes, void* dgate,
                                                    int64_t dgate_bytes, void* dup, int64_t dup_bytes, int64_t count,
                                                    int kind, int dtype, int threads);
ENTRENAR_API int entrenar_rms_norm(const void* x, int64_t x_bytes, const void* weight, int64_t weight_bytes, void* out,
                                   int64_t out_bytes, int64_t rows, int64_t columns, float eps, float offset, int dtype,
                                   int weight_dtype, int threads);
ENTRENAR_API int entrenar_rms_norm_backward(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes,
                                            const void* weight, int64_t weight_bytes, const void* added,
                                            int64_t added_bytes, void* dx, int64_t dx_bytes, int64_t rows,
                                            int64_t columns, float eps, float offset, int dtype, int weight_dtype,
                                            int threads);
ENTRENAR_API int entrenar_rms_norm_backward_weight(const void* grad, int64_t grad_bytes, const void* x, int64_t x_bytes,
                                                   void* dweight, int64_t dweight_bytes, int64_t rows, int64_t columns,
                                                   float eps, int dtype, int weight_dtype, int threads);
ENTRENAR_API int entrenar_rotary(const void* x, int64_t x_bytes, const void* cos, int64_t cos_bytes, const void* sin,
                                 int64_t sin_bytes, void* out, int64_t out_bytes, int64_t batch, int64_t tokens,
                                 int64_t heads, int64_t width, int64_t rotated, int64_t batch_stride,
                                 int64_t token_stride, int64_t head_stride, int64_t cos_batches, int dtype,
                                 int cos_dtype, int transpose, int threads);
ENTRENAR_API int entrenar_dequantize_gguf(const void* in, int64_t in_bytes, void* out, int64_t out_bytes, int64_t rows,
                                          int64_t columns, int type, int out_dtype, int threads);
ENTRENAR_API int entrenar_quantize_gguf(const void* in, int64_t in_bytes, void* out, int64_t out_bytes,
                                        const void* importance, int64_t importance_bytes, int64_t rows, int64_t columns,
                                        int type, int in_dtype, int threads);
ENTRENAR_API int entrenar_linear_codebook(const entrenar::SourceView* view, const void* x, int64_t x_bytes,
                                          const void* bias, int64_t bias_bytes, void* y, int64_t y_bytes,
                                          int64_t tokens, int dtype, int threads);
ENTRENAR_API int entrenar_linear_codebook_backward(const entrenar::SourceView* view, const void* gradient,
                                                   int64_t gradient_bytes, void* dx, int64_t dx_bytes, int64_t tokens,
                                                   int dtype, int threads);
ENTRENAR_API int entrenar_multiply(const entrenar::TermView* terms, int64_t count, const void* bias, int64_t bias_bytes,
                                   void* out, int64_t out_bytes, int64_t rows, int64_t columns, float alpha,
                                   int out_dtype, int threads);
ENTRENAR_API int entrenar_merge_histogram(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                          int64_t base_bytes, int base_dtype, int64_t count, int64_t prefix,
                                          void* counts, int64_t counts_bytes);
ENTRENAR_API int entrenar_merge_between(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                        int64_t base_bytes, int base_dtype, int64_t count, int64_t first, int64_t last,
                                        void* out, int64_t out_bytes, void* totals, int64_t totals_bytes);
ENTRENAR_API int entrenar_merge_keep_top(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                         int64_t base_bytes, int base_dtype, int64_t count, int64_t threshold,
                                         void* ties, int64_t ties_bytes, int outside, void* mask, int64_t mask_bytes);
ENTRENAR_API int entrenar_merge_keep_random(int64_t first, int64_t second, int64_t start, int64_t count, int64_t limit,
                                            void* mask, int64_t mask_bytes);
ENTRENAR_API int entrenar_merge_keep_by_rank(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                             int64_t base_bytes, int base_dtype, int64_t rows, int64_t columns,
                                             const void* range, int64_t range_bytes, int64_t first, int64_t second,
                                             int64_t start, void* mask, int64_t mask_bytes);
ENTRENAR_API int entrenar_merge_absolute_sums(const void* x, int64_t x_bytes, int x_dtype, const void* base,
                                              int64_t base_bytes, int base_dtype, const void* mask, int64_t mask_bytes,
                                              int64_t count, void* sums, int64_t sums_bytes);
ENTRENAR_API int entrenar_merge_non_finite(const void* x, int64_t x_bytes, int x_dtype, int64_t count, void* total,
                                           int64_t total_bytes);
ENTRENAR_API int entrenar_merge_weighted_sum(const void* inputs, int64_t inputs_bytes, const void* coefficients,
                                             int64_t coefficients_bytes, int64_t n, int64_t count, void* out,
                                             int64_t out_bytes, int out_dtype);
ENTRENAR_API int entrenar_merge_task_sum(const void* base, int64_t base_bytes, int base_dtype, const void* inputs,
                                         int64_t inputs_bytes, const void* factors, int64_t factors_bytes, int64_t n,
                                         int64_t count, const void* lambda, int64_t lambda_bytes, int flags, void* out,
                                         int64_t out_bytes, int out_dtype);
ENTRENAR_API int entrenar_merge_gram(const void* inputs, int64_t inputs_bytes, int64_t n, const void* base,
                                     int64_t base_bytes, int base_dtype, int64_t count, void* gram, int64_t gram_bytes);
ENTRENAR_API int entrenar_nest_scales(const void* scales, int64_t scales_bytes, const void* offset,
                                      int64_t offset_bytes, const void* map, int64_t map_bytes, void* codes,
                                      int64_t codes_bytes, void* group, int64_t group_bytes, int64_t count,
                                      int threads);
ENTRENAR_API int entrenar_decode_scales(const void* scales, int64_t scales_bytes, const void* group,
                                        int64_t group_bytes, const void* offset, int64_t offset_bytes, const void* map,
                                        int64_t map_bytes, void* out, int64_t out_bytes, int64_t count, int threads);
ENTRENAR_API int entrenar_quantize_symmetric(const void* in, int64_t in_bytes, void* codes, int64_t codes_bytes,
                                             void* scales, int64_t scales_bytes, int64_t count, int64_t block_size,
                                             int limit, int dtype, int threads);
ENTRENAR_API int entrenar_dequantize_int8(const void* codes, int64_t codes_bytes, const void* scales,
                                          int64_t scales_bytes, const void* group, int64_t group_bytes,
                                          const void* offset, int64_t offset_bytes, const void* map, int64_t map_bytes,
                                          void* out, int64_t out_bytes, int64_t count, int64_t block_size, int dtype,
                                          int threads);
ENTRENAR_API const char* entrenar_abi();
