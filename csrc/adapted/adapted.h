// Linear layers that share an input, each with or without low-rank factors, in one forward and one backward.
//
// Letters: M tokens, I inner, O rows of a weight, r rank.
#pragma once

#include <cstdint>

#include "matmul/matmul.h"

namespace entrenar {

// One layer. A (r, I) and B (O, r) are dense or, for rank 0, absent.
struct MemberView {
    SourceView weight, a, b;
    const void* bias;  // (O,) bfloat16 or null
    int64_t bias_bytes;
    void* y;           // forward: the result (M, O); backward: its gradient; bfloat16
    int64_t y_bytes;
    void* da;          // (r, I) float32
    int64_t da_bytes;
    void* db;          // (O, r) float32
    int64_t db_bytes;
    int64_t rank;
    float scale;
    int32_t unused;
};

struct GroupView {
    const void* x;  // (M, I) bfloat16
    int64_t x_bytes;
    void* dx;       // (M, I) bfloat16, or null where nobody wants it
    int64_t dx_bytes;
    const void* residual;  // (M, O) bfloat16, added to the only member's result, or null
    int64_t residual_bytes;
    void* u;  // x·Aᵀ of all members and zeros behind it, hidden_elements() bfloat16: a forward writes it, a backward reads it;
              // null: room is found, and it is made again
    int64_t u_bytes;
    int64_t tokens, inner, count;
    const MemberView* members;
};

// Error unless a member of a group over `inner` columns is in order, and in a backward its room for gradients. Its y is not
// looked at: a caller made of several operations checks all their members before the first.
int check_member(const MemberView& member, int64_t inner, bool backward);

// Elements of u of a group: (tokens, R), every member's rank rounded up to a whole strip, and a step of zeros; 0 where no
// member has a rank. False where that overflows.
bool hidden_elements(const MemberView* members, int64_t count, int64_t tokens, int64_t* elements);

// y = x·Wᵀ + bias + (x·Aᵀ)·(scale·B)ᵀ of every member.
int adapted_forward(const GroupView& view, int threads);

// dx, and dA and dB of every member with a rank, from the gradients of the results.
int adapted_backward(const GroupView& view, int threads);

}  // namespace entrenar
