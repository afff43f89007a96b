// Linear layers that share an input, each with or without low-rank factors: the sums of products of
// layers/adapted_linear.py, one call for a forward and one for a backward.
//
// Letters as in group.h. As an inner dimension u and v are read in steps of 32: what is read of a neighbour meets the
// zeros that follow a factor.
#include "adapted/adapted.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>
#include "abi/abi.h"

#include "adapted/group.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "matmul/panel.h"
#include "matmul/sum.h"

namespace entrenar {

namespace {

constexpr int64_t kMostMembers = 1 << 16;  // more is a mistake, and would not fit memory

// All of a member but its y.
int read_member(const MemberView& view, int64_t inner, Member* member) {
    member->view = &view;
    if (const int error = read_weight(view.weight, &member->weight)) return error;
    if (view.weight.columns != inner || view.rank < 0 || view.rank > (1 << 20)) return kBadArgument;
    if (view.bias != nullptr) {
        if (const int error = check_buffer(view.bias, view.bias_bytes, view.weight.rows, 2)) return error;
    }
    if (view.rank == 0) return kOk;
    const bool fits = view.a.rows == view.rank && view.a.columns == inner && view.b.rows == view.weight.rows &&
                      view.b.columns == view.rank;
    if (!fits) return kBadArgument;
    if (const int error = read_weight(view.a, &member->a)) return error;
    SourceView scaled = view.b;
    scaled.scale *= view.scale;
    return read_weight(scaled, &member->b);
}

int read_group(bool reads_x, Group* group) {
    const GroupView& view = group->view;
    int64_t elements = 0;
    if (view.count < 0 || view.count > kMostMembers || !multiply(view.tokens, view.inner, &elements)) return kBadSize;
    if (view.members == nullptr && view.count > 0) return kNullPointer;
    group->members.resize(static_cast<size_t>(view.count));
    for (int64_t i = 0; i < view.count; ++i) {
        Member& member = group->members[static_cast<size_t>(i)];
        if (const int error = read_member(view.members[i], view.inner, &member)) return error;
        int64_t results = 0;
        if (!multiply(view.tokens, member.weight.view.rows, &results)) return kBadSize;
        if (const int error = check_buffer(member.view->y, member.view->y_bytes, results, 2)) return error;
        member.offset = group->width;
        group->width += member.padded_rank();
    }
    if (view.u != nullptr) {
        if (!hidden_elements(view.members, view.count, view.tokens, &elements)) return kBadSize;
        if (const int error = check_buffer(view.u, view.u_bytes, elements, 2)) return error;
    }
    // A backward without factors has no use for x.
    return reads_x || group->width > 0 ? check_buffer(view.x, view.x_bytes, view.tokens * view.inner, 2) : kOk;
}

Sum into(int64_t rows, int64_t columns, void* data, int64_t stride, int dtype, float alpha = 1.0f) {
    return {rows, columns, {}, {data, stride, dtype, false, rows, {}}, alpha, nullptr, nullptr};
}

// u (M, R): x·Aᵀ of all members in one product, which reads x once.
Sum hidden_product(const Group& group, const Weight& stacked, uint16_t* u) {
    Sum sum = into(group.view.tokens, group.width, u, group.width, kBfloat16);
    sum.terms.push_back(
        {static_cast<const uint16_t*>(group.view.x), group.view.inner, group.view.inner, true, &stacked});
    return sum;
}

int forward(const Group& group) {
    auto* u = static_cast<uint16_t*>(group.view.u);
    if (group.width > 0) {
        const int64_t elements = group.view.tokens * group.width;
        if (u == nullptr) u = reinterpret_cast<uint16_t*>(thread_scratch((elements + kStep) * 2, Scratch::call));
        if (u == nullptr) return kNoMemory;
        std::memset(u + elements, 0, kStep * 2);  // the last row's step may reach so far
        const Weight stacked = group.stacked_a();
        if (const int error = multiply_sums(group.kernel, {hidden_product(group, stacked, u)}, group.threads))
            return error;
    }
    const auto* x = static_cast<const uint16_t*>(group.view.x);
    std::vector<Sum> sums;
    for (const Member& member : group.members) {
        const int64_t rows = member.view->weight.rows;
        Sum sum = into(group.view.tokens, rows, member.view->y, rows, kBfloat16);
        sum.bias = static_cast<const uint16_t*>(member.view->bias);
        sum.residual = static_cast<const uint16_t*>(group.view.residual);
        sum.terms.push_back({x, group.view.inner, group.view.inner, true, &member.weight});
        if (member.view->rank > 0)
            sum.terms.push_back({u + member.offset, group.width, member.inner_rank(), true, &member.b});
        sums.push_back(std::move(sum));
    }
    return multiply_sums(group.kernel, sums, group.threads);
}

// v (M, R): g·(scale·B) of every member.
void add_passed_back(const Group& group, uint16_t* v, std::vector<Sum>* sums) {
    for (const Member& member : group.members) {
        if (member.view->rank == 0) continue;
        const int64_t rows = member.view->weight.rows;
        sums->push_back(into(group.view.tokens, member.padded_rank(), v + member.offset, group.width, kBfloat16));
        sums->back().terms.push_back({static_cast<const uint16_t*>(member.view->y), rows, rows, false, &member.b});
    }
}

// dx = Σ g·W + v·A.
Sum input_gradient(const Group& group, const uint16_t* v) {
    Sum sum = into(group.view.tokens, group.view.inner, group.view.dx, group.view.inner, kBfloat16);
    for (const Member& member : group.members) {
        const int64_t rows = member.view->weight.rows;
        sum.terms.push_back({static_cast<const uint16_t*>(member.view->y), rows, rows, false, &member.weight});
        if (member.view->rank > 0)
            sum.terms.push_back({v + member.offset, group.width, member.inner_rank(), false, &member.a});
    }
    return sum;
}

Weight plain_source(const void* data, int64_t rows, int64_t columns) {
    SourceView view{};
    view.dtype = kBfloat16;
    view.rows = rows;
    view.columns = view.stride = columns;
    view.scale = 1.0f;
    view.data = data;
    view.data_bytes = rows * columns * 2;
    Weight source;
    read_weight(view, &source);  // cannot fail: the sizes were checked with the caller's buffers
    return source;
}

// dA = vᵀ·x of all members in one product, which reads x once; v transposed is (R, padded).
Sum gradients_of_a(const Group& group, const uint16_t* v, int64_t padded, const Weight& x) {
    Sum sum = into(group.width, group.view.inner, nullptr, 0, kFloat32);
    for (const Member& member : group.members) {
        for (int64_t row = 0; row < member.padded_rank(); ++row) {
            auto* da = static_cast<float*>(member.view->da) + row * group.view.inner;
            sum.out.rows.push_back(row < member.view->rank ? da : nullptr);
        }
    }
    sum.terms.push_back({v, padded, group.view.tokens, false, &x});
    return sum;
}

// dB = scale · gᵀ·u, as the transpose of uᵀ·g; u transposed is (R, padded), `grads` a source for every member.
void add_gradients_of_b(const Group& group, const uint16_t* u, int64_t padded, const std::vector<Weight>& grads,
                        std::vector<Sum>* sums) {
    for (size_t i = 0; i < group.members.size(); ++i) {
        const Member& member = group.members[i];
        if (member.view->rank == 0) continue;
        Sum sum = into(member.padded_rank(), member.view->weight.rows, member.view->db, member.view->rank, kFloat32,
                       member.view->scale);
        sum.out.transposed = true;
        sum.out.row_limit = member.view->rank;
        sum.terms.push_back({u + member.offset * padded, padded, group.view.tokens, false, &grads[i]});
        sums->push_back(std::move(sum));
    }
}

// What a backward makes on its way: v and u (M, R), each with zeros behind it, and both transposed, (R, padded). u may
// be the forward's.
struct Hidden {
    uint16_t *v, *u, *v_transposed, *u_transposed, *packed;
    int64_t padded;

    static int64_t plain_elements(const Group& group) { return group.view.tokens * group.width + kStep; }
    static int64_t packed_strip(const Group& group) { return packed_elements(group.view.tokens, kStrip); }

    // False if there is no memory.
    bool make(const Group& group) {
        padded = divide_up(group.view.tokens, kStep) * kStep;
        const int64_t plain = plain_elements(group), transposed = padded * group.width;
        const int64_t strips = 2 * group.width / kStrip;
        v = reinterpret_cast<uint16_t*>(
            thread_scratch((2 * (plain + transposed) + strips * packed_strip(group)) * 2, Scratch::call));
        if (v == nullptr) return false;
        u = v + plain, v_transposed = u + plain, u_transposed = v_transposed + transposed,
        packed = u_transposed + transposed;
        for (uint16_t* product : {v, u}) std::memset(product + plain - kStep, 0, kStep * 2);
        if (group.view.u != nullptr) u = static_cast<uint16_t*>(group.view.u);
        return true;
    }

    void transpose(const Group& group) const {
        const int64_t strips = group.width / kStrip;
        parallel_items(2 * strips, group.threads, [&](int64_t item) {
            const int64_t column = item % strips * kStrip;
            transpose_rows(group.kernel, (item < strips ? v : u) + column, group.width, group.view.tokens, kStrip,
                           padded, packed + item * packed_strip(group),
                           (item < strips ? v_transposed : u_transposed) + column * padded);
        });
    }
};

int backward(const Group& group) {
    if (group.width == 0)
        return group.view.dx == nullptr ? kOk
                                        : multiply_sums(group.kernel, {input_gradient(group, nullptr)}, group.threads);
    Hidden hidden;
    if (!hidden.make(group)) return kNoMemory;
    const Weight stacked = group.stacked_a(), x = plain_source(group.view.x, group.view.tokens, group.view.inner);
    std::vector<Sum> first;
    if (group.view.u == nullptr) first.push_back(hidden_product(group, stacked, hidden.u));
    add_passed_back(group, hidden.v, &first);
    if (const int error = multiply_sums(group.kernel, first, group.threads)) return error;
    hidden.transpose(group);
    std::vector<Weight> grads;
    for (const Member& member : group.members) {
        grads.push_back(plain_source(member.view->y, group.view.tokens, member.view->weight.rows));
    }
    std::vector<Sum> second;
    if (group.view.dx != nullptr) second.push_back(input_gradient(group, hidden.v));
    second.push_back(gradients_of_a(group, hidden.v_transposed, hidden.padded, x));
    add_gradients_of_b(group, hidden.u_transposed, hidden.padded, grads, &second);
    return multiply_sums(group.kernel, second, group.threads);
}

// Of a member that was read.
int check_gradients(const MemberView& member, int64_t inner) {
    if (member.rank == 0) return kOk;
    int64_t da = 0, db = 0;
    if (!multiply(member.rank, inner, &da) || !multiply(member.weight.rows, member.rank, &db)) return kBadSize;
    if (const int error = check_buffer(member.da, member.da_bytes, da, 4)) return error;
    return check_buffer(member.db, member.db_bytes, db, 4);
}

}  // namespace

int check_member(const MemberView& view, int64_t inner, bool backward) {
    Member member;
    if (const int error = read_member(view, inner, &member)) return error;
    return backward ? check_gradients(view, inner) : kOk;
}

bool hidden_elements(const MemberView* members, int64_t count, int64_t tokens, int64_t* elements) {
    int64_t width = 0;
    for (int64_t i = 0; i < count; ++i) width += divide_up(members[i].rank, kStrip) * kStrip;
    if (!multiply(tokens, width, elements)) return false;
    return width == 0 || !__builtin_add_overflow(*elements, kStep, elements);
}

int adapted_forward(const GroupView& view, int threads) {
    Group group{view, matmul_kernel(), {}, 0, threads};
    if (const int error = read_group(true, &group)) return error;
    if (view.residual != nullptr) {
        if (view.count != 1) return kBadArgument;
        const int64_t elements = view.tokens * view.members[0].weight.rows;  // y's size, which was checked
        if (const int error = check_buffer(view.residual, view.residual_bytes, elements, 2)) return error;
    }
    if (view.tokens == 0) return kOk;
    return takes_few_tokens(group) ? forward_few_tokens(group) : forward(group);
}

int adapted_backward(const GroupView& view, int threads) {
    Group group{view, matmul_kernel(), {}, 0, threads};
    if (const int error = read_group(false, &group)) return error;
    if (view.dx != nullptr) {
        const int64_t elements = view.tokens * view.inner;  // read_group saw that it does not overflow
        if (const int error = check_buffer(view.dx, view.dx_bytes, elements, 2)) return error;
    }
    for (const Member& member : group.members) {
        if (const int error = check_gradients(*member.view, view.inner)) return error;
    }
    return backward(group);
}

}  // namespace entrenar

ENTRENAR_API int entrenar_adapted(const entrenar::GroupView* view, int threads) {
    return entrenar::adapted_forward(*view, threads);
}

ENTRENAR_API int entrenar_adapted_backward(const entrenar::GroupView* view, int threads) {
    return entrenar::adapted_backward(*view, threads);
}
