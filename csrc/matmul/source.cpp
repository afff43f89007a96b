// Decoding of a piece of a row, whatever the weight is held as.
#include "matmul/source.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "matmul/matmul.h"

namespace entrenar {
namespace {

void decode_dense(const SourceView& view, int64_t row, int64_t column, int64_t count, uint16_t* out) {
    const int64_t first = row * view.stride + column;
    if (view.dtype == kBfloat16 && view.scale == 1.0f) {
        std::memcpy(out, static_cast<const char*>(view.data) + first * 2, static_cast<size_t>(count) * 2);
        return;
    }
    if (view.dtype == kFloat32) {
        matmul_kernel().store_bf16({out, nullptr, nullptr, 0, 1, count}, static_cast<const float*>(view.data) + first,
                                   0, view.scale);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        out[i] = float_to_bf16(load_element(view.data, view.dtype, first + i) * view.scale);
    }
}

// Blocks are decoded whole; of one that the piece covers in part, that part is kept.
void decode_gguf(const SourceView& view, const gguf::BlockType& type, int64_t row, int64_t column, int64_t count,
                 uint16_t* out) {
    const auto* blocks = static_cast<const uint8_t*>(view.data) + row * (view.columns / type.elements) * type.bytes;
    while (count > 0) {
        const uint8_t* block = blocks + column / type.elements * type.bytes;
        const int64_t skip = column % type.elements, whole = skip == 0 ? count / type.elements : 0;
        int64_t made = whole * type.elements;
        if (whole > 0) {
            type.dequantize({block, out, kBfloat16, whole});
        } else {
            alignas(64) uint16_t values[gguf::kSuperBlock];
            type.dequantize({block, values, kBfloat16, 1});
            made = std::min(count, type.elements - skip);
            std::memcpy(out, values + skip, static_cast<size_t>(made) * 2);
        }
        out += made;
        column += made;
        count -= made;
    }
}

// The part of a stack that holds `row`, and that row within it; null behind the last.
const Source* part_of(const Source& stack, int64_t* row) {
    for (const Source* part : stack.parts) {
        const int64_t rows = divide_up(part->view.rows, kStrip) * kStrip;
        if (*row < rows) return part;
        *row -= rows;
    }
    return nullptr;
}

bool is_kind(const SourceView& view, SourceKind kind) { return view.kind == static_cast<int32_t>(kind); }

int check_dense(const SourceView& view) {
    if (view.dtype != kFloat32 && view.dtype != kBfloat16) return kBadDtype;
    if (view.stride < view.columns) return kBadArgument;
    int64_t reach = 0;
    if (!multiply(std::max<int64_t>(view.rows - 1, 0), view.stride, &reach)) return kBadSize;
    if (__builtin_add_overflow(reach, view.rows > 0 ? view.columns : 0, &reach)) return kBadSize;
    return check_buffer(view.data, view.data_bytes, reach, dtype_bytes(view.dtype));
}

int check_gguf(const SourceView& view, int64_t count, gguf::BlockType* type) {
    *type = gguf::block_type(view.dtype);
    if (type->dequantize == nullptr) return kBadArgument;
    if (view.columns % type->elements != 0) return kBadSize;
    return check_buffer(view.data, view.data_bytes, count / type->elements, type->bytes);
}

}  // namespace

const uint16_t* Source::plain(int64_t row, int64_t rows, int64_t column, int64_t count, int64_t* stride) const {
    if (is_kind(view, SourceKind::stack)) {
        const Source* part = part_of(*this, &row);
        return part ? part->plain(row, rows, column, count, stride) : nullptr;
    }
    const bool bf16 = is_kind(view, SourceKind::dense) && view.dtype == kBfloat16 && view.scale == 1.0f;
    if (!bf16 || rows > view.rows - row || count > view.columns - column) return nullptr;
    *stride = view.stride;
    return static_cast<const uint16_t*>(view.data) + row * view.stride + column;
}

void Source::decode(int64_t row, int64_t column, int64_t count, uint16_t* out) const {
    if (is_kind(view, SourceKind::stack)) {
        const Source* part = part_of(*this, &row);
        if (part) return part->decode(row, column, count, out);
        std::memset(out, 0, static_cast<size_t>(count) * 2);
        return;
    }
    const int64_t there = row < view.rows ? std::clamp<int64_t>(view.columns - column, 0, count) : 0;
    if (there < count) std::memset(out + there, 0, static_cast<size_t>(count - there) * 2);
    if (there == 0) return;
    if (is_kind(view, SourceKind::dense)) return decode_dense(view, row, column, there, out);
    if (is_kind(view, SourceKind::gguf)) return decode_gguf(view, block, row, column, there, out);
    const int64_t begin = row * view.columns + column;
    if (is_kind(view, SourceKind::int8)) {
        return entrenar::decode(symmetric_kernel(), int8, begin, begin + there, out, kBfloat16);
    }
    entrenar::decode(*decoder, codebook, begin, begin + there, out, kBfloat16, false);
}

Source stack_sources(std::vector<const Source*> parts) {
    SourceView view{};
    view.kind = static_cast<int32_t>(SourceKind::stack);
    for (const Source* part : parts) {
        view.rows += divide_up(part->view.rows, kStrip) * kStrip;
        view.columns = part->view.columns;
    }
    return {view, {}, nullptr, std::move(parts), {}, {}};
}

int read_source(const SourceView& view, Source* source) {
    int64_t count = 0;
    if (!multiply(view.rows, view.columns, &count)) return kBadSize;
    *source = {view, {}, &dequantize_codebook_kernel(), {}, {}, {}};
    if (is_kind(view, SourceKind::dense)) return check_dense(view);
    if (is_kind(view, SourceKind::gguf)) return check_gguf(view, count, &source->block);
    if (is_kind(view, SourceKind::int8)) {
        return read_int8(view.data, view.data_bytes, view.scales, view.block_size, count, &source->int8);
    }
    if (!is_kind(view, SourceKind::codebook4)) return kBadArgument;
    return read_weight(view.data, view.data_bytes, view.scales, view.codebook, view.codebook_bytes, view.block_size,
                       count, &source->codebook);
}

}  // namespace entrenar
