// What both blocks share.
#include "block/block.h"

#include "common/floats.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {

int check_norm(const NormView& norm, int64_t columns) {
    if (!is_dtype(norm.dtype)) return kBadDtype;
    return check_buffer(norm.weight, norm.bytes, columns, dtype_bytes(norm.dtype));
}

int norm_forward(const NormView& norm, const void* x, int64_t rows, int64_t columns, void* out, int threads) {
    const int64_t bytes = rows * columns * 2;
    return rms_norm(x, bytes, norm.weight, norm.bytes, out, bytes, rows, columns, norm.eps, norm.offset, kBfloat16,
                    norm.dtype, threads);
}

int norm_backward(const NormView& norm, const void* grad, const void* x, const void* added, int64_t rows,
                  int64_t columns, void* dx, int threads) {
    const int64_t bytes = rows * columns * 2;
    return rms_norm_backward(grad, bytes, x, bytes, norm.weight, norm.bytes, added, added ? bytes : 0, dx, bytes, rows,
                             columns, norm.eps, norm.offset, kBfloat16, norm.dtype, threads);
}

MemberView member_at(const MemberView& member, void* y, int64_t tokens) {
    MemberView placed = member;
    placed.y = y;
    placed.y_bytes = tokens * member.weight.rows * 2;
    return placed;
}

GroupView group_of(const void* x, void* dx, const BufferView& u, int64_t tokens, int64_t inner,
                   const MemberView* members, int64_t count) {
    const int64_t bytes = tokens * inner * 2;
    return {x, x ? bytes : 0, dx, dx ? bytes : 0, nullptr, 0, u.data, u.bytes, tokens, inner, count, members};
}

int check_hidden(const BufferView& u, const MemberView* members, int64_t count, int64_t tokens) {
    int64_t elements = 0;
    if (u.data == nullptr) return kOk;
    return hidden_elements(members, count, tokens, &elements) ? check_buffer(u.data, u.bytes, elements, 2) : kBadSize;
}

bool Pieces::allocate() {
    next_ = fits_ ? thread_scratch(bytes_, Scratch::block) : nullptr;
    return next_ != nullptr;
}

uint16_t* Pieces::take(int64_t elements) {
    auto* piece = reinterpret_cast<uint16_t*>(next_);
    next_ += padded(elements);
    return piece;
}

}  // namespace entrenar
