// Linear layers that share an input, each with or without low-rank factors, in one forward and one backward.
//
// Letters: M tokens, I inner, O rows of a weight, r rank.
#pragma once

#include <cstdint>

#include "abi/abi.h"
#include "matmul/matmul.h"

namespace entrenar {

// Error unless a member of a group over `inner` columns is in order, and in a backward its room for gradients. Its y is
// not looked at: a caller made of several operations checks all their members before the first.
int check_member(const MemberView& member, int64_t inner, bool backward);

// Elements of u of a group: (tokens, R), every member's rank rounded up to a whole strip, and a step of zeros; 0 where
// no member has a rank. False where that overflows.
bool hidden_elements(const MemberView* members, int64_t count, int64_t tokens, int64_t* elements);

// y = x·Wᵀ + bias + (x·Aᵀ)·(scale·B)ᵀ of every member.
int adapted_forward(const GroupView& view, int threads);

// dx, and dA and dB of every member with a rank, from the gradients of the results.
int adapted_backward(const GroupView& view, int threads);

}  // namespace entrenar
