// h + output(attention(rotate(q(x)), rotate(k(x)), v(x))), x = norm(h), as a residual block; q and k may have norms of
// their own over each head (Qwen 3), and may not be rotated (SmolLM 3's every fourth layer).
#include <utility>

#include "abi/abi.h"
#include "attention/attention.h"

#include "block/block.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {

// What a pass makes: the block's result, its gradients, or only what attention takes (q, k and v are needed then, and
// attention itself is somebody else's: one with a cache).
enum class Pass { forward, backward, inputs };

namespace {

struct Sizes {
    int64_t rows, hidden, queries, keys;  // M, and elements of h, of q, of k

    explicit Sizes(const AttentionBlockView& view)
        : rows(view.batch * view.tokens),
          hidden(rows * view.hidden),
          queries(rows * view.heads * view.width),
          keys(rows * view.kv_heads * view.width) {}
};

int check_members(const AttentionBlockView& view, bool backward) {
    const int64_t queries = view.heads * view.width, keys = view.kv_heads * view.width;
    const int64_t shapes[4][2] = {
        {queries, view.hidden}, {keys, view.hidden}, {keys, view.hidden}, {view.hidden, queries}};
    for (int i = 0; i < 4; ++i) {
        if (view.members[i].weight.rows != shapes[i][0]) return kBadArgument;
        if (const int error = check_member(view.members[i], shapes[i][1], backward)) return error;
    }
    return kOk;
}

int check_norms_and_rotation(const AttentionBlockView& view) {
    if (const int error = check_norm(view.norm, view.hidden)) return error;
    if ((view.q_norm.weight == nullptr) != (view.k_norm.weight == nullptr)) return kBadArgument;
    for (const NormView* norm : {&view.q_norm, &view.k_norm}) {
        if (norm->weight == nullptr) continue;
        if (const int error = check_norm(*norm, view.width)) return error;
    }
    if (view.cos.data == nullptr && view.sin.data == nullptr) return kOk;
    return check_turns(view.cos.data, view.cos.bytes, view.sin.data, view.sin.bytes, view.batch, view.tokens,
                       view.width, view.rotated, view.rotary_batches, view.rotary_dtype);
}

// All that any part of the block would refuse: nothing is written before it is known that nothing will.
int check(const AttentionBlockView& view, Pass pass) {
    const bool backward = pass == Pass::backward, inputs = pass == Pass::inputs;
    const AttentionView attention{view.batch,
                                  view.tokens,
                                  view.heads,
                                  view.kv_heads,
                                  view.width,
                                  view.starts.data,
                                  view.starts.bytes,
                                  view.scale,
                                  0,
                                  {},
                                  {},
                                  {}};
    int64_t elements = 0;
    if (const int error = check_attention_sizes(attention)) return error;
    if (!multiply(view.batch * view.tokens, view.hidden, &elements)) return kBadSize;
    if (const int error = check_members(view, backward)) return error;
    if (const int error = check_norms_and_rotation(view)) return error;
    const Sizes sizes(view);
    const struct {
        const BufferView& buffer;
        int64_t elements, bytes;
        bool needed;
    } buffers[] = {{view.h, sizes.hidden, 2, true},
                   {view.out, sizes.hidden, 2, !inputs},
                   {view.dh, sizes.hidden, 2, backward},
                   {view.x, sizes.hidden, 2, false},
                   {view.q, sizes.queries, 2, inputs},
                   {view.k, sizes.keys, 2, inputs},
                   {view.v, sizes.keys, 2, inputs},
                   {view.o, sizes.queries, 2, false},
                   {view.lse, sizes.rows * view.heads, 4, false}};
    for (const auto& required : buffers) {
        if (required.buffer.data == nullptr && !required.needed) continue;
        if (const int error =
                check_buffer(required.buffer.data, required.buffer.bytes, required.elements, required.bytes))
            return error;
    }
    if (const int error = check_hidden(view.u, view.members, 3, sizes.rows)) return error;
    return check_hidden(view.output_u, view.members + 3, 1, sizes.rows);
}

struct Values {
    uint16_t *x, *raw_q, *raw_k, *q, *k, *v, *o;
    float* lse;
};

HeadsView heads_of(const AttentionBlockView& view, const void* data, int64_t heads) {
    const int64_t token = heads * view.width;
    return {data, view.batch * view.tokens * token * 2, view.tokens * token, token, view.width};
}

AttentionView attention_of(const AttentionBlockView& view, const Values& values) {
    return {view.batch,
            view.tokens,
            view.heads,
            view.kv_heads,
            view.width,
            view.starts.data,
            view.starts.bytes,
            view.scale,
            0,
            heads_of(view, values.q, view.heads),
            heads_of(view, values.k, view.kv_heads),
            heads_of(view, values.v, view.kv_heads)};
}

// from (B, T, heads, D) → to, rotated by the angles of its position, or back.
int rotate(const AttentionBlockView& view, const void* from, void* to, int64_t heads, bool back, int threads) {
    const HeadsView in = heads_of(view, from, heads);
    return rotary(from, in.bytes, view.cos.data, view.cos.bytes, view.sin.data, view.sin.bytes, to, in.bytes,
                  view.batch, view.tokens, heads, view.width, view.rotated, in.batch, in.token, in.head,
                  view.rotary_batches, kBfloat16, view.rotary_dtype, back, threads);
}

// What a layer gave for q or k → what attention takes: norm, then rotation. `between` is room for the norm's result.
int prepare(const AttentionBlockView& view, const NormView& norm, const uint16_t* raw, int64_t heads, uint16_t* between,
            uint16_t* to, int threads) {
    const int64_t rows = view.batch * view.tokens * heads;
    const bool rotates = view.cos.data != nullptr;
    if (norm.weight != nullptr) {
        uint16_t* normed = rotates ? between : to;
        if (const int error = norm_forward(norm, raw, rows, view.width, normed, threads)) return error;
        raw = normed;
    }
    return rotates ? rotate(view, raw, to, heads, false, threads) : kOk;
}

bool has_norms(const AttentionBlockView& view) {
    return view.q_norm.weight != nullptr || view.k_norm.weight != nullptr;
}
bool changes(const AttentionBlockView& view) { return has_norms(view) || view.cos.data != nullptr; }

struct Needs {
    bool x, projections, attention;
};

// Make the values, as far as they are needed; `between` has room for q.
int compute(const AttentionBlockView& view, const Values& values, const Needs& needs, uint16_t* between, int threads) {
    const Sizes sizes(view);
    if (needs.x) {
        if (const int error = norm_forward(view.norm, view.h.data, sizes.rows, view.hidden, values.x, threads))
            return error;
    }
    if (needs.projections) {
        const MemberView members[3] = {member_at(view.members[0], values.raw_q, sizes.rows),
                                       member_at(view.members[1], values.raw_k, sizes.rows),
                                       member_at(view.members[2], values.v, sizes.rows)};
        const GroupView group = group_of(values.x, nullptr, view.u, sizes.rows, view.hidden, members, 3);
        if (const int error = adapted_forward(group, threads)) return error;
    }
    if (values.raw_q != values.q && (needs.projections || has_norms(view))) {
        if (const int error = prepare(view, view.q_norm, values.raw_q, view.heads, between, values.q, threads))
            return error;
        if (const int error = prepare(view, view.k_norm, values.raw_k, view.kv_heads, between, values.k, threads))
            return error;
    }
    if (!needs.attention) return kOk;
    const AttentionView attention = attention_of(view, values);
    return attention_forward(&attention, values.o, sizes.queries * 2, values.lse, sizes.rows * view.heads * 4, threads);
}

// Kept q and k are raw where they have norms, and what attention takes elsewhere.
Values place_values(const AttentionBlockView& view, const Sizes& sizes, Pieces* pieces) {
    Values values{};
    values.x = pieces->place(view.x, sizes.hidden);
    uint16_t *q = pieces->place(view.q, sizes.queries), *k = pieces->place(view.k, sizes.keys);
    values.v = pieces->place(view.v, sizes.keys);
    values.o = pieces->place(view.o, sizes.queries);
    values.lse = reinterpret_cast<float*>(pieces->place(view.lse, sizes.rows * view.heads * 2));
    uint16_t *other_q = changes(view) ? pieces->take(sizes.queries) : q,
             *other_k = changes(view) ? pieces->take(sizes.keys) : k;
    values.raw_q = has_norms(view) ? q : other_q;
    values.raw_k = has_norms(view) ? k : other_k;
    values.q = has_norms(view) ? other_q : q;
    values.k = has_norms(view) ? other_k : k;
    return values;
}

void want_values(const AttentionBlockView& view, const Sizes& sizes, Pieces* pieces) {
    pieces->want(view.x, sizes.hidden);
    for (const BufferView* buffer : {&view.q, &view.o}) pieces->want(*buffer, sizes.queries);
    for (const BufferView* buffer : {&view.k, &view.v}) pieces->want(*buffer, sizes.keys);
    pieces->want(view.lse, sizes.rows * view.heads * 2);
    if (!changes(view)) return;
    pieces->want(sizes.queries);
    pieces->want(sizes.keys);
}

int forward(const AttentionBlockView& view, int threads) {
    const Sizes sizes(view);
    Pieces pieces;
    want_values(view, sizes, &pieces);
    pieces.want(sizes.queries);
    if (!pieces.allocate()) return kNoMemory;
    const Values values = place_values(view, sizes, &pieces);
    if (const int error = compute(view, values, {true, true, true}, pieces.take(sizes.queries), threads)) return error;
    const MemberView output = member_at(view.members[3], view.out.data, sizes.rows);
    GroupView group = group_of(values.o, nullptr, view.output_u, sizes.rows, view.heads * view.width, &output, 1);
    group.residual = view.h.data;
    group.residual_bytes = sizes.hidden * 2;
    return adapted_forward(group, threads);
}

// q, k and v as attention takes them, in the caller's buffers.
int make_inputs(const AttentionBlockView& view, int threads) {
    const Sizes sizes(view);
    Pieces pieces;
    pieces.want(sizes.hidden);
    for (int64_t elements : {sizes.queries, sizes.queries, sizes.keys}) pieces.want(elements);
    if (!pieces.allocate()) return kNoMemory;
    Values values{};
    values.x = pieces.take(sizes.hidden);
    uint16_t *between = pieces.take(sizes.queries), *raw_q = pieces.take(sizes.queries),
             *raw_k = pieces.take(sizes.keys);
    values.q = static_cast<uint16_t*>(view.q.data);
    values.k = static_cast<uint16_t*>(view.k.data);
    values.v = static_cast<uint16_t*>(view.v.data);
    values.raw_q = changes(view) ? raw_q : values.q;
    values.raw_k = changes(view) ? raw_k : values.k;
    return compute(view, values, {true, true, false}, between, threads);
}

// The gradient of what attention took → that of what the layer gave, in place of `grad`; `between` is room for as much.
int prepare_backward(const AttentionBlockView& view, const NormView& norm, const uint16_t* raw, int64_t heads,
                     uint16_t* between, uint16_t** grad, int threads) {
    uint16_t* other = between;
    if (view.cos.data != nullptr) {
        if (const int error = rotate(view, *grad, other, heads, true, threads)) return error;
        std::swap(*grad, other);
    }
    if (norm.weight == nullptr) return kOk;
    const int64_t rows = view.batch * view.tokens * heads;
    if (const int error = norm_backward(norm, *grad, raw, nullptr, rows, view.width, other, threads)) return error;
    std::swap(*grad, other);
    return kOk;
}

int backward(const AttentionBlockView& view, int threads) {
    const Sizes sizes(view);
    Pieces pieces;
    want_values(view, sizes, &pieces);
    pieces.want(sizes.hidden);
    for (int i = 0; i < 3; ++i) pieces.want(sizes.queries);
    for (int i = 0; i < 3; ++i) pieces.want(sizes.keys);
    if (!pieces.allocate()) return kNoMemory;
    const Values values = place_values(view, sizes, &pieces);
    uint16_t *dx = pieces.take(sizes.hidden), *d_o = pieces.take(sizes.queries), *dq = pieces.take(sizes.queries);
    uint16_t *dk = pieces.take(sizes.keys), *dv = pieces.take(sizes.keys), *between_k = pieces.take(sizes.keys);
    uint16_t* between = pieces.take(sizes.queries);
    const bool projections = view.q.data == nullptr || view.k.data == nullptr || view.v.data == nullptr;
    const bool attention = view.o.data == nullptr || view.lse.data == nullptr;
    if (const int error = compute(view, values, {view.x.data == nullptr, projections, attention}, between, threads))
        return error;
    const MemberView output = member_at(view.members[3], view.out.data, sizes.rows);
    const GroupView last = group_of(values.o, d_o, view.output_u, sizes.rows, view.heads * view.width, &output, 1);
    if (const int error = adapted_backward(last, threads)) return error;
    const AttentionView inner = attention_of(view, values);
    if (const int error = attention_backward(&inner, values.o, sizes.queries * 2, d_o, sizes.queries * 2, values.lse,
                                             sizes.rows * view.heads * 4, dq, sizes.queries * 2, dk, sizes.keys * 2, dv,
                                             sizes.keys * 2, threads)) {
        return error;
    }
    if (const int error = prepare_backward(view, view.q_norm, values.raw_q, view.heads, between, &dq, threads))
        return error;
    if (const int error = prepare_backward(view, view.k_norm, values.raw_k, view.kv_heads, between_k, &dk, threads))
        return error;
    const MemberView members[3] = {member_at(view.members[0], dq, sizes.rows),
                                   member_at(view.members[1], dk, sizes.rows),
                                   member_at(view.members[2], dv, sizes.rows)};
    const GroupView first = group_of(values.x, dx, view.u, sizes.rows, view.hidden, members, 3);
    if (const int error = adapted_backward(first, threads)) return error;
    return norm_backward(view.norm, dx, view.h.data, view.out.data, sizes.rows, view.hidden, view.dh.data, threads);
}

}  // namespace
}  // namespace entrenar

ENTRENAR_API int entrenar_attention_block(const entrenar::AttentionBlockView* view, int threads) {
    using namespace entrenar;
    if (const int error = check(*view, Pass::forward)) return error;
    return forward(*view, threads);
}

ENTRENAR_API int entrenar_attention_block_backward(const entrenar::AttentionBlockView* view, int threads) {
    using namespace entrenar;
    if (const int error = check(*view, Pass::backward)) return error;
    return backward(*view, threads);
}

ENTRENAR_API int entrenar_attention_inputs(const entrenar::AttentionBlockView* view, int threads) {
    using namespace entrenar;
    if (const int error = check(*view, Pass::inputs)) return error;
    return make_inputs(*view, threads);
}
