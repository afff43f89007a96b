// The table of kinds, and what holds for a weight of any.
#include "weights/weight.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "linear/linear.h"
#include "matmul/matmul.h"

namespace entrenar {
namespace {

const WeightKind* const kKinds[] = {&kDenseKind, &kCodebook4Kind, &kGgufKind, &kInt8Kind};

const WeightKind* kind_of(int32_t number) {
    for (const WeightKind* kind : kKinds) {
        if (static_cast<int32_t>(kind->kind) == number) return kind;
    }
    return nullptr;
}

// The part of a stack that holds `row`, and that row within it; null behind the last.
const Weight* part_of(const Weight& stack, int64_t* row) {
    for (const Weight* part : stack.parts) {
        const int64_t rows = divide_up(part->view.rows, kStrip) * kStrip;
        if (*row < rows) return part;
        *row -= rows;
    }
    return nullptr;
}

}  // namespace

const uint16_t* Weight::plain(int64_t row, int64_t rows, int64_t column, int64_t count, int64_t* stride) const {
    if (kind == nullptr) {
        const Weight* part = part_of(*this, &row);
        return part ? part->plain(row, rows, column, count, stride) : nullptr;
    }
    if (kind->plain == nullptr || rows > view.rows - row || count > view.columns - column) return nullptr;
    return kind->plain(*this, row, column, stride);
}

void Weight::decode(int64_t row, int64_t column, int64_t count, uint16_t* out) const {
    if (kind == nullptr) {
        const Weight* part = part_of(*this, &row);
        if (part) return part->decode(row, column, count, out);
        std::memset(out, 0, static_cast<size_t>(count) * 2);
        return;
    }
    const int64_t there = row < view.rows ? std::clamp<int64_t>(view.columns - column, 0, count) : 0;
    if (there < count) std::memset(out + there, 0, static_cast<size_t>(count - there) * 2);
    if (there > 0) kind->decode(*this, row, column, there, out, kBfloat16);
}

Meeting Weight::meeting(int64_t tokens) const {
    const bool few = tokens >= 1 && tokens <= kMaxPackedTokens && view.columns > 0;
    return few && kind != nullptr && kind->add != nullptr ? kind->meeting(*this) : Meeting::decoded;
}

Weight stack_weights(std::vector<const Weight*> parts) {
    Weight stack;
    for (const Weight* part : parts) {
        stack.view.rows += divide_up(part->view.rows, kStrip) * kStrip;
        stack.view.columns = part->view.columns;
    }
    stack.parts = std::move(parts);
    return stack;
}

int read_weight(const SourceView& view, Weight* weight) {
    int64_t count = 0;
    if (!multiply(view.rows, view.columns, &count)) return kBadSize;
    weight->view = view;
    weight->kind = kind_of(view.kind);
    return weight->kind == nullptr ? kBadArgument : weight->kind->check(view, count, weight);
}

}  // namespace entrenar
