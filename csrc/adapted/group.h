// A group of linear layers as it was read and checked: what the forwards and the backward of adapted.h work on.
//
// Letters: M tokens, I inner, O rows of a weight, r rank. The factors' products u = x·Aᵀ and v = g·(scale·B) of all
// members lie side by side in one matrix (M, R), each from a whole strip of 16 columns on.
#pragma once

#include <cstdint>
#include <vector>

#include "adapted/adapted.h"
#include "common/sizes.h"

namespace entrenar {

struct Member {
    const MemberView* view;
    Weight weight, a, b;  // b times the scale
    int64_t offset;       // of its columns among the R
    int64_t padded_rank() const { return divide_up(view->rank, kStrip) * kStrip; }
    int64_t inner_rank() const { return divide_up(view->rank, kStep) * kStep; }
};

struct Group {
    const GroupView& view;
    const MatmulKernel& kernel;
    std::vector<Member> members;
    int64_t width = 0;  // R
    int threads;

    // The members' A one below the other, (R, inner).
    Weight stacked_a() const {
        std::vector<const Weight*> parts;
        for (const Member& member : members) {
            if (member.view->rank > 0) parts.push_back(&member.a);
        }
        return stack_weights(parts);
    }
};

// Whether a forward is over so few tokens that every weight's bytes are better read once, row by row.
bool takes_few_tokens(const Group& group);
int forward_few_tokens(const Group& group);

}  // namespace entrenar
