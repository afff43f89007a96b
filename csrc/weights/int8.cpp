// One byte an element, a scale a block.
#include "common/floats.h"
#include "linear/linear.h"
#include "symmetric/symmetric.h"
#include "weights/weight.h"

namespace entrenar {
namespace {

int check(const SourceView& view, int64_t count, Weight* weight) {
    return read_int8(view.data, view.data_bytes, view.scales, view.block_size, count, &weight->state<Int8Weight>());
}

void decode(const Weight& weight, int64_t row, int64_t column, int64_t count, void* out, int dtype) {
    const int64_t begin = row * weight.view.columns + column;
    entrenar::decode(symmetric_kernel(), weight.state<Int8Weight>(), begin, begin + count, out, dtype);
}

Meeting meeting(const Weight&) { return Meeting::wide; }

void add(const Weight& weight, const FewTokens& tokens, int64_t first, int64_t count, float* sums) {
    const int64_t columns = weight.view.columns;
    float of_row[kMaxPackedTokens];
    for (int64_t r = 0; r < count; ++r) {
        const int64_t begin = (first + r) * columns;
        dot(symmetric_kernel(), weight.state<Int8Weight>(), begin, begin + columns, tokens.wide, columns, tokens.count,
            of_row);
        for (int64_t t = 0; t < tokens.count; ++t) sums[t * kTileRows + r] += of_row[t];
    }
}

}  // namespace

const WeightKind kInt8Kind = {SourceKind::int8, check, decode, true, nullptr, meeting, add};

}  // namespace entrenar
