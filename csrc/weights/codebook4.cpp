// Codes of 4 bits into a codebook, a scale a block.
#include <algorithm>

#include "codebook4/dequantize.h"
#include "common/prefetch.h"
#include "common/sizes.h"
#include "linear/linear.h"
#include "weights/weight.h"

namespace entrenar {
namespace {

constexpr int64_t kTilesAhead = 2;

int check(const SourceView& view, int64_t count, Weight* weight) {
    return read_codebook_weight(view.data, view.data_bytes, view.scales, view.codebook, view.codebook_bytes,
                                view.block_size, count, &weight->state<CodebookWeight>());
}

void decode(const Weight& weight, int64_t row, int64_t column, int64_t count, void* out, int dtype) {
    const int64_t begin = row * weight.view.columns + column;
    entrenar::decode(dequantize_codebook_kernel(), weight.state<CodebookWeight>(), begin, begin + count, out, dtype,
                     false);
}

Meeting meeting(const Weight& weight) {
    if (linear_kernel().packed_dot == nullptr) return Meeting::decoded;
    const int64_t size = weight.state<CodebookWeight>().block_size;
    // A chunk is whole blocks, or a part of one.
    const bool fits = size >= 16 && (size & (size - 1)) == 0 && weight.view.columns % size == 0;
    return fits ? Meeting::chunks : Meeting::decoded;
}

// Ask for scales that will be read soon.
void fetch_scales(const ScaleBuffers& scales, int64_t first, int64_t count) {
    const int64_t width = scales.group == nullptr ? 4 : 1;
    const char* at = static_cast<const char*>(scales.values) + first * width;
    for (int64_t i = 0; i < count * width; i += 64) __builtin_prefetch(at + i);
}

void add(const Weight& weight, const FewTokens& tokens, int64_t first, int64_t count, float* sums) {
    const auto& codes = weight.state<CodebookWeight>();
    const auto packed_dot = linear_kernel().packed_dot;
    const int64_t columns = weight.view.columns, size = codes.block_size, blocks = columns / size;  // of a row
    float scales[kTileRows * kScaleGroup];
    for (int64_t block = 0; block < blocks; block += kScaleGroup) {
        const int64_t some = std::min(kScaleGroup, blocks - block), column = block * size;
        for (int64_t r = 0; r < count; ++r) {
            decode_scales(codes.scales, (first + r) * blocks + block, some, scales + r * kScaleGroup);
        }
        fetch_scales(codes.scales, (first + kTilesAhead * kTileRows) * blocks + block, count * some);
        const uint8_t* packed = codes.packed + (first * columns + column) / 2;
        const float* x = tokens.chunks + column;
        packed_dot({packed, columns / 2, scales, kScaleGroup, codes.codebook, size, some * size, x,
                    whole_chunks(columns), tokens.count},
                   count, sums);
    }
}

}  // namespace

const WeightKind kCodebook4Kind = {SourceKind::codebook4, check, decode, true, nullptr, meeting, add};

}  // namespace entrenar
