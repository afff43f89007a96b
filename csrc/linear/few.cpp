// The rows of a product for few tokens; see few.h.
#include "linear/few.h"

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"
#include "common/floats.h"
#include "linear/linear.h"

namespace entrenar {
namespace {

decltype(Linear::dot) pick_dot(int dtype) {
#if defined(__x86_64__)
    if (dtype == kBfloat16 && has_avx512_bf16()) return dot_bf16_avx512bf16;
#endif
    (void)dtype;
    return linear_kernel().dot;
}

bool is_codebook(const Source& source) { return source.view.kind == static_cast<int32_t>(SourceKind::codebook4); }

// Columns [column, column + count) of a row of any weight as bfloat16, of a 4-bit one as any dtype.
void decode_row(const Source& source, int64_t row, int64_t column, int64_t count, char* to, int dtype) {
    if (!is_codebook(source)) return source.decode(row, column, count, reinterpret_cast<uint16_t*>(to));
    const int64_t begin = row * source.view.columns + column;
    decode(*source.decoder, source.codebook, begin, begin + count, to, dtype, false);
}

template <int kDtype>
void arrange_as(const FewTokens& tokens, int64_t columns, float* to) {
    for (int64_t t = 0; t < tokens.count; ++t) {
        for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
            const int64_t from = t * tokens.stride + chunk, lanes = std::min(columns - chunk, kChunk) / kDword;
            for (int64_t nibble = 0; nibble < kDword; ++nibble) {
                for (int64_t lane = 0; lane < 16; ++lane) {
                    *to++ = lane < lanes ? load_element(tokens.x, kDtype, from + chunk_element(nibble, lane)) : 0.0f;
                }
            }
        }
    }
}

}  // namespace

bool stays_packed(const Source& source, const FewTokens& tokens) {
    if (!is_codebook(source) || linear_kernel().packed_dot == nullptr) return false;
    const int64_t size = source.codebook.block_size, columns = source.view.columns;
    return tokens.count >= 1 && tokens.count <= kMaxPackedTokens && columns > 0 && size >= 16 && (size & (size - 1)) == 0 &&
           columns % size == 0;
}

void arrange(const FewTokens& tokens, int64_t columns, float* to) {
    const auto run = tokens.dtype == kFloat32 ? arrange_as<kFloat32> : tokens.dtype == kFloat16 ? arrange_as<kFloat16> : arrange_as<kBfloat16>;
    run(tokens, columns, to);
}

FewTokensProduct::FewTokensProduct(const Source& source, const FewTokens& tokens)
    : source_(source), tokens_(tokens), packed_(tokens.arranged != nullptr && stays_packed(source, tokens)), dot_(pick_dot(tokens.dtype)) {}

void FewTokensProduct::add(int64_t first, int64_t count, float* sums) const {
    if (packed_) return add_packed(first, count, sums);
    alignas(64) float tile[kTileRows * kTileColumns];  // room for float32; a 16-bit tile uses half
    const int64_t bytes = dtype_bytes(tokens_.dtype), all = source_.view.columns;
    if (count < kTileRows) std::memset(tile, 0, sizeof tile);
    for (int64_t k = 0; k < all; k += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, all - k);
        for (int64_t r = 0; r < count; ++r) {
            char* row = reinterpret_cast<char*>(tile) + r * kTileColumns * bytes;
            decode_row(source_, first + r, k, columns, row, tokens_.dtype);
        }
        dot_(tile, static_cast<const char*>(tokens_.x) + k * bytes, tokens_.stride, tokens_.count, columns, tokens_.dtype, sums);
    }
}

void FewTokensProduct::add_packed(int64_t first, int64_t count, float* sums) const {
    const CodebookWeight& weight = source_.codebook;
    const auto packed_dot = linear_kernel().packed_dot;
    const int64_t columns = source_.view.columns, blocks = columns / weight.block_size;  // of a row
    float scales[kScaleGroup], found[kMaxPackedTokens];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t block = 0; block < blocks; block += kScaleGroup) {
            const int64_t row = first + r, some = std::min(kScaleGroup, blocks - block), column = block * weight.block_size;
            decode_scales(weight.scales, row * blocks + block, some, scales);
            packed_dot(weight.packed + (row * columns + column) / 2, scales, weight.codebook, weight.block_size, tokens_.arranged + column,
                       arranged_columns(columns), tokens_.count, some * weight.block_size, found);
            for (int64_t t = 0; t < tokens_.count; ++t) sums[t * kTileRows + r] += found[t];
        }
    }
}

}  // namespace entrenar
