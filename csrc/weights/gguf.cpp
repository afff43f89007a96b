// Blocks of a GGUF type, row after row.
#include <algorithm>
#include <cstring>

#include "common/errors.h"
#include "common/floats.h"
#include "common/sizes.h"
#include "gguf/blocks.h"
#include "linear/linear.h"
#include "weights/weight.h"

namespace entrenar {
namespace {

int check(const SourceView& view, int64_t count, Weight* weight) {
    auto& type = weight->state<gguf::BlockType>();
    type = gguf::block_type(view.dtype);
    if (type.dequantize == nullptr) return kBadArgument;
    if (view.columns % type.elements != 0) return kBadSize;
    return check_buffer(view.data, view.data_bytes, count / type.elements, type.bytes);
}

const uint8_t* row_of(const Weight& weight, const gguf::BlockType& type, int64_t row) {
    return static_cast<const uint8_t*>(weight.view.data) + row * (weight.view.columns / type.elements) * type.bytes;
}

// Blocks are decoded whole; of one that the piece covers in part, that part is used.
void decode(const Weight& weight, int64_t row, int64_t column, int64_t count, void* to, int) {
    const auto& type = weight.state<gguf::BlockType>();
    auto* out = static_cast<uint16_t*>(to);
    const uint8_t* blocks = row_of(weight, type, row);
    while (count > 0) {
        const uint8_t* block = blocks + column / type.elements * type.bytes;
        const int64_t skip = column % type.elements, whole = skip == 0 ? count / type.elements : 0;
        int64_t decoded = whole * type.elements;
        if (whole > 0) {
            type.dequantize({block, out, kBfloat16, whole});
        } else {
            alignas(64) uint16_t values[gguf::kSuperBlock];
            type.dequantize({block, values, kBfloat16, 1});
            decoded = std::min(count, type.elements - skip);
            std::memcpy(out, values + skip, static_cast<size_t>(decoded) * 2);
        }
        out += decoded;
        column += decoded;
        count -= decoded;
    }
}

Meeting meeting(const Weight&) { return Meeting::wide; }

void add(const Weight& weight, const FewTokens& tokens, int64_t first, int64_t count, float* sums) {
    const auto& type = weight.state<gguf::BlockType>();
    const int64_t columns = weight.view.columns, blocks = columns / type.elements;
    float of_row[kMaxPackedTokens];
    for (int64_t r = 0; r < count; ++r) {
        type.dot({row_of(weight, type, first + r), blocks, tokens.wide, columns, tokens.count, of_row});
        for (int64_t t = 0; t < tokens.count; ++t) sums[t * kTileRows + r] += of_row[t];
    }
}

}  // namespace

const WeightKind kGgufKind = {SourceKind::gguf, check, decode, false, nullptr, meeting, add};

}  // namespace entrenar
