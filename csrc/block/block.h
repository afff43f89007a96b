// The two residual blocks of a decoder layer, h + f(norm(h)), whole: forward and backward are one call each.
//
// Letters: B rows of a batch, T tokens, M = B·T, C hidden size, H heads, G key-value heads, D width of a head, I inner
// size of the MLP. All tensors are bfloat16 and contiguous but where something else is said.
#pragma once

#include <cstdint>

#include "abi/abi.h"
#include "adapted/adapted.h"

namespace entrenar {

// Error unless the weight is one for rows of `columns`.
int check_norm(const NormView& norm, int64_t columns);
// x → norm(x), rows of `columns`.
int norm_forward(const NormView& norm, const void* x, int64_t rows, int64_t columns, void* out, int threads);
// dx = added + the norm's gradient for x; `added` may be null.
int norm_backward(const NormView& norm, const void* grad, const void* x, const void* added, int64_t rows,
                  int64_t columns, void* dx, int threads);

// A member whose result, or its gradient, is at `y`.
MemberView member_at(const MemberView& member, void* y, int64_t tokens);
GroupView group_of(const void* x, void* dx, const BufferView& u, int64_t tokens, int64_t inner,
                   const MemberView* members, int64_t count);
// Error unless `u` is null or room for what the factors make of a group's input.
int check_hidden(const BufferView& u, const MemberView* members, int64_t count, int64_t tokens);

// Pieces of one scratch, 64 bytes apart.
class Pieces {
public:
    // The whole is what the pieces asked for so far; take() then returns them in the same order.
    void want(int64_t elements) {
        fits_ = fits_ && elements < int64_t{1} << 56;
        bytes_ += fits_ ? padded(elements) : 0;
    }
    bool allocate();
    uint16_t* take(int64_t elements);

    // The caller's buffer where there is one, else a piece: wanted, then placed.
    void want(const BufferView& buffer, int64_t elements) {
        if (buffer.data == nullptr) want(elements);
    }
    uint16_t* place(const BufferView& buffer, int64_t elements) {
        return buffer.data ? static_cast<uint16_t*>(buffer.data) : take(elements);
    }

private:
    static int64_t padded(int64_t elements) { return (elements * 2 + 63) / 64 * 64; }
    bool fits_ = true;
    int64_t bytes_ = 0;
    char* next_ = nullptr;
};

}  // namespace entrenar
