// The forward over few tokens: what generating a text is made of.
#include <algorithm>

#include "adapted/group.h"
#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "linear/few.h"

namespace entrenar {
namespace {

// u (M, R): x·Aᵀ of all members.
void make_hidden(const Group& group, const FewTokens& x, uint16_t* u) {
    const Weight stacked = group.stacked_a();
    const FewTokensProduct product(stacked, x);
    parallel_for(group.width, kGrainRows, group.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kTileRows) {
            float sums[kMaxTokens * kTileRows] = {};
            product.add(row, kTileRows, sums);  // a width is a multiple of 16
            for (int64_t t = 0; t < x.count; ++t) {
                uint16_t* to = u + t * group.width + row;
                for (int64_t r = 0; r < kTileRows; ++r) to[r] = float_to_bf16(sums[t * kTileRows + r]);
            }
        }
    });
}

// A member's product and its factors', which joins it before it is rounded.
struct Job {
    const Group& group;
    const Member& member;
    FewTokens x, hidden;
    int64_t begin;  // of its grains among all members'

    int64_t rows() const { return member.view->weight.rows; }
    int64_t end() const { return begin + divide_up(rows(), kGrainRows); }

    void run(int64_t grain) const {
        const FewTokensProduct product(member.weight, x), low_rank(member.b, hidden);
        const int64_t first = (grain - begin) * kGrainRows, last = std::min(first + kGrainRows, rows());
        for (int64_t row = first; row < last; row += kTileRows) {
            const int64_t count = std::min(kTileRows, last - row);
            float sums[kMaxTokens * kTileRows] = {};
            product.add(row, count, sums);
            if (member.view->rank > 0) low_rank.add(row, count, sums);
            store(row, count, sums);
        }
    }

    void store(int64_t row, int64_t count, const float* sums) const {
        const void *bias = member.view->bias, *residual = group.view.residual;
        for (int64_t t = 0; t < x.count; ++t) {
            for (int64_t r = 0; r < count; ++r) {
                const int64_t at = t * rows() + row + r;
                float value = sums[t * kTileRows + r];
                if (bias) value += load_element(bias, kBfloat16, row + r);
                if (residual) value += load_element(residual, kBfloat16, at);
                store_element(member.view->y, kBfloat16, at, value);
            }
        }
    }
};

}  // namespace

bool takes_few_tokens(const Group& group) {
    const Path path = current_path();
    if (path == Path::generic || path == Path::neon) return false;  // scalar sums are slower than whole products
    const auto dense = [](const Member& member) { return member.weight.kind->add == nullptr; };
    if (group.view.u != nullptr) return false;  // this way makes u in another form
    const bool any_dense = std::any_of(group.members.begin(), group.members.end(), dense);
    return group.view.tokens <= (any_dense ? kMaxPackedTokens / 2 : kMaxPackedTokens);  // those need no decoding
}

int forward_few_tokens(const Group& group) {
    FewTokens x{group.view.x, group.view.tokens, group.view.inner, kBfloat16, nullptr, nullptr};
    Arranged arranged;
    for (const Member& member : group.members) arranged.meet(member.weight, x);
    const int64_t floats = arranged.floats(x, group.view.inner);
    char* scratch = thread_scratch(floats * 4 + x.count * group.width * 2 + 1, Scratch::call);
    if (scratch == nullptr) return kNoMemory;
    arranged.fill(&x, group.view.inner, reinterpret_cast<float*>(scratch));
    auto* u = reinterpret_cast<uint16_t*>(scratch + floats * 4);
    if (group.width > 0) make_hidden(group, x, u);
    std::vector<Job> jobs;
    int64_t grains = 0;
    for (const Member& member : group.members) {
        jobs.push_back(
            {group, member, x, {u + member.offset, x.count, group.width, kBfloat16, nullptr, nullptr}, grains});
        grains = jobs.back().end();
    }
    parallel_for(grains, 1, group.threads, [&](int64_t begin, int64_t end) {
        for (int64_t grain = begin; grain < end; ++grain) {
            std::find_if(jobs.begin(), jobs.end(), [grain](const Job& job) { return grain < job.end(); })->run(grain);
        }
    });
    return kOk;
}

}  // namespace entrenar
