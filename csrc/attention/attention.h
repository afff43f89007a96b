// Causal attention over bfloat16 with grouped heads and a first key per token, a block of rows at a time so that no
// (tokens, tokens) matrix exists (FlashAttention-2, Dao 2023).
//
// Letters: B rows of a batch, T tokens, H heads, G key-value heads, D width of a head.
#pragma once

#include <cstdint>
#include <vector>

#include "abi/abi.h"
#include "matmul/panel.h"

namespace entrenar {

// A score below every real one, of a key that is not attended: its exponential is 0.
constexpr float kUnattended = -1e30f;

// The keys that the tokens of one row attend: from `first` to the token itself, but for [gap, resumed).
struct Attended {
    std::vector<int64_t> first, gap, resumed;  // gap and resumed are empty where no token has a gap

    bool has_gaps() const { return !gap.empty(); }

    // How many of the keys [begin, end) a token attends.
    int64_t count(int64_t token, int64_t begin, int64_t end) const;
};
Attended attended_keys(const AttentionView& view, int64_t row);

// Error unless sizes and starts are in order.
int check_attention_sizes(const AttentionView& view);

// The same, and the buffers of q, k and v.
int check_attention(const AttentionView& view);

// Of one query row so far: the largest score and the sum of exponentials relative to it.
struct RowState {
    float maximum, sum;
};

// The row-wise parts.
struct AttentionRows {
    // One row of scores against a chunk of keys, of which [first, last) count: their scaled exponentials go to p
    // (bfloat16, 0 elsewhere up to `columns`, a multiple of 32), the state is brought up to date, and what was summed
    // before into `o` (width floats) is rescaled when there is a new maximum.
    void (*softmax)(const float* scores, int64_t first, int64_t last, int64_t columns, float scale, RowState* state,
                    float* o, int64_t width, uint16_t* p);
    // out = o / sum as bfloat16.
    void (*finish)(const float* o, float sum, int64_t width, uint16_t* out);
    // Σ a·b.
    float (*dot)(const uint16_t* a, const uint16_t* b, int64_t width);
    // One key's row against a chunk of queries, of which [first, last) count: p = e^(scale·score − lse) and
    // ds = p·(scale·dp − delta) as bfloat16, 0 elsewhere up to `columns`, a multiple of 32.
    void (*gradient)(const float* scores, const float* dp, const float* lse, const float* delta, int64_t first,
                     int64_t last, int64_t columns, float scale, uint16_t* p, uint16_t* ds);
    // out (count, width) bfloat16, rows `stride` apart, = the transpose of c (width, pitch).
    void (*store_transposed)(const float* c, int64_t pitch, int64_t count, int64_t width, uint16_t* out,
                             int64_t stride);
};

extern const AttentionRows attention_generic, attention_avx2, attention_avx512bf16;

// The products and the table of the path in use.
struct AttentionKernels {
    const MatmulKernel& products;
    const AttentionRows& rows;
};
AttentionKernels attention_kernels();

// What other groups are made of; the exported functions do nothing else.
int attention_forward(const AttentionView* view, void* out, int64_t out_bytes, void* lse, int64_t lse_bytes,
                      int threads);
int attention_backward(const AttentionView* view, const void* out, int64_t out_bytes, const void* grad,
                       int64_t grad_bytes, const void* lse, int64_t lse_bytes, void* dq, int64_t dq_bytes, void* dk,
                       int64_t dk_bytes, void* dv, int64_t dv_bytes, int threads);

}  // namespace entrenar
