// h + down(act(gate(x)) · up(x)), x = norm(h): SwiGLU and its kin (Shazeer 2020) as a residual block.
#include "block/block.h"

#include "abi/abi.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {

namespace {

// All that any part of the block would refuse: nothing is written before it is known that nothing will.
int check(const MlpBlockView& view, bool backward) {
    int64_t wide = 0, narrow = 0;
    if (!multiply(view.tokens, view.hidden, &narrow) || !multiply(view.tokens, view.inner, &wide)) return kBadSize;
    if (!is_activation(view.activation)) return kBadArgument;
    if (const int error = check_norm(view.norm, view.hidden)) return error;
    for (const MemberView& member : view.members) {
        const bool down = &member == &view.members[2];
        if (member.weight.rows != (down ? view.hidden : view.inner)) return kBadArgument;
        if (const int error = check_member(member, down ? view.inner : view.hidden, backward)) return error;
    }
    for (const BufferView* needed : {&view.h, &view.out, backward ? &view.dh : &view.out}) {
        if (const int error = check_buffer(needed->data, needed->bytes, narrow, 2)) return error;
    }
    if (view.x.data != nullptr) {
        if (const int error = check_buffer(view.x.data, view.x.bytes, narrow, 2)) return error;
    }
    for (const BufferView* buffer : {&view.gate, &view.up, &view.product}) {
        if (buffer->data == nullptr) continue;
        if (const int error = check_buffer(buffer->data, buffer->bytes, wide, 2)) return error;
    }
    if (const int error = check_hidden(view.u, view.members, 2, view.tokens)) return error;
    return check_hidden(view.down_u, view.members + 2, 1, view.tokens);
}

// Where the values between are: the caller's buffers, or scratch.
struct Values {
    uint16_t *x, *gate, *up, *product;
};

struct Needs {
    bool x, gates, product;
};

void want_values(const MlpBlockView& view, int64_t narrow, int64_t wide, Pieces* pieces) {
    pieces->want(view.x, narrow);
    for (const BufferView* buffer : {&view.gate, &view.up, &view.product}) pieces->want(*buffer, wide);
}

Values place_values(const MlpBlockView& view, int64_t narrow, int64_t wide, Pieces* pieces) {
    uint16_t* x = pieces->place(view.x, narrow);
    uint16_t *gate = pieces->place(view.gate, wide), *up = pieces->place(view.up, wide);
    return {x, gate, up, pieces->place(view.product, wide)};
}

// Make x, gate and up, product, as far as they are needed.
int compute(const MlpBlockView& view, const Values& values, const Needs& needs, int threads) {
    const int64_t wide = view.tokens * view.inner;
    if (needs.x) {
        if (const int error = norm_forward(view.norm, view.h.data, view.tokens, view.hidden, values.x, threads))
            return error;
    }
    if (needs.gates) {
        const MemberView members[2] = {member_at(view.members[0], values.gate, view.tokens),
                                       member_at(view.members[1], values.up, view.tokens)};
        const GroupView group = group_of(values.x, nullptr, view.u, view.tokens, view.hidden, members, 2);
        if (const int error = adapted_forward(group, threads)) return error;
    }
    if (!needs.product) return kOk;
    return gated_activation(values.gate, wide * 2, values.up, wide * 2, values.product, wide * 2, wide, view.activation,
                            kBfloat16, threads);
}

int forward(const MlpBlockView& view, int threads) {
    const int64_t narrow = view.tokens * view.hidden, wide = view.tokens * view.inner;
    Pieces pieces;
    want_values(view, narrow, wide, &pieces);
    if (!pieces.allocate()) return kNoMemory;
    const Values values = place_values(view, narrow, wide, &pieces);
    if (const int error = compute(view, values, {true, true, true}, threads)) return error;
    const MemberView down = member_at(view.members[2], view.out.data, view.tokens);
    GroupView group = group_of(values.product, nullptr, view.down_u, view.tokens, view.inner, &down, 1);
    group.residual = view.h.data;
    group.residual_bytes = narrow * 2;
    return adapted_forward(group, threads);
}

int backward(const MlpBlockView& view, int threads) {
    const int64_t narrow = view.tokens * view.hidden, wide = view.tokens * view.inner;
    // Gradients take the places of what is read for the last time where they are made: the kernels allow that.
    const bool own_dup = view.product.data != nullptr;
    Pieces pieces;
    want_values(view, narrow, wide, &pieces);
    pieces.want(narrow);
    for (int i = 0; i < 1 + own_dup; ++i) pieces.want(wide);
    if (!pieces.allocate()) return kNoMemory;
    const Values values = place_values(view, narrow, wide, &pieces);
    uint16_t *dx = pieces.take(narrow), *dproduct = pieces.take(wide), *dgate = dproduct;
    uint16_t* dup = own_dup ? pieces.take(wide) : values.product;
    const Needs needs{view.x.data == nullptr, view.gate.data == nullptr || view.up.data == nullptr,
                      view.product.data == nullptr};
    if (const int error = compute(view, values, needs, threads)) return error;
    const MemberView down = member_at(view.members[2], view.out.data, view.tokens);
    const GroupView last = group_of(values.product, dproduct, view.down_u, view.tokens, view.inner, &down, 1);
    if (const int error = adapted_backward(last, threads)) return error;
    if (const int error =
            gated_activation_backward(dproduct, wide * 2, values.gate, wide * 2, values.up, wide * 2, dgate, wide * 2,
                                      dup, wide * 2, wide, view.activation, kBfloat16, threads)) {
        return error;
    }
    const MemberView members[2] = {member_at(view.members[0], dgate, view.tokens),
                                   member_at(view.members[1], dup, view.tokens)};
    const GroupView first = group_of(values.x, dx, view.u, view.tokens, view.hidden, members, 2);
    if (const int error = adapted_backward(first, threads)) return error;
    return norm_backward(view.norm, dx, view.h.data, view.out.data, view.tokens, view.hidden, view.dh.data, threads);
}

}  // namespace
}  // namespace entrenar

ENTRENAR_API int entrenar_mlp_block(const entrenar::MlpBlockView* view, int threads) {
    using namespace entrenar;
    if (const int error = check(*view, false)) return error;
    return view->tokens > 0 ? forward(*view, threads) : kOk;
}

ENTRENAR_API int entrenar_mlp_block_backward(const entrenar::MlpBlockView* view, int threads) {
    using namespace entrenar;
    if (const int error = check(*view, true)) return error;
    return backward(*view, threads);
}
