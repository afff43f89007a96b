// The rows of a product for few tokens; see few.h.
#include "linear/few.h"

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"
#include "common/floats.h"
#include "common/sizes.h"
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

bool is_kind(const Source& source, SourceKind kind) { return source.view.kind == static_cast<int32_t>(kind); }

// Columns [column, column + count) of a row of any weight as bfloat16, of a 4-bit one as any dtype.
void decode_row(const Source& source, int64_t row, int64_t column, int64_t count, char* to, int dtype) {
    if (!is_kind(source, SourceKind::codebook4))
        return source.decode(row, column, count, reinterpret_cast<uint16_t*>(to));
    const int64_t begin = row * source.view.columns + column;
    decode(*source.decoder, source.codebook, begin, begin + count, to, dtype, false);
}

// How a weight's rows meet few tokens: decoded a tile at a time, or as they are held.
enum class Way { decoded, chunks, wide };

Way way_of(const Source& source, int64_t tokens) {
    if (tokens < 1 || tokens > kMaxPackedTokens || source.view.columns == 0) return Way::decoded;
    if (is_kind(source, SourceKind::gguf) || is_kind(source, SourceKind::int8)) return Way::wide;
    if (!is_kind(source, SourceKind::codebook4) || linear_kernel().packed_dot == nullptr) return Way::decoded;
    const int64_t size = source.codebook.block_size;
    // A chunk is whole blocks, or a part of one.
    const bool fits = size >= 16 && (size & (size - 1)) == 0 && source.view.columns % size == 0;
    return fits ? Way::chunks : Way::decoded;
}

constexpr int64_t kTilesAhead = 2;

// Ask for scales that will be read soon.
void fetch_scales(const ScaleBuffers& scales, int64_t first, int64_t count) {
    const int64_t width = scales.group == nullptr ? 4 : 1;
    const char* at = static_cast<const char*>(scales.values) + first * width;
    for (int64_t i = 0; i < count * width; i += 64) __builtin_prefetch(at + i);
}

int64_t whole_chunks(int64_t columns) { return divide_up(columns, kChunk) * kChunk; }

template <int kDtype>
void arrange_chunks(const FewTokens& tokens, int64_t columns, float* to) {
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

template <int kDtype>
void widen(const FewTokens& tokens, int64_t columns, float* to) {
    for (int64_t t = 0; t < tokens.count; ++t) {
        for (int64_t k = 0; k < columns; ++k) *to++ = load_element(tokens.x, kDtype, t * tokens.stride + k);
    }
}

}  // namespace

void Arranged::meet(const Source& source, const FewTokens& tokens) {
    const Way way = way_of(source, tokens.count);
    wide_ = wide_ || way == Way::wide;
    chunks_ = chunks_ || way == Way::chunks;
}

int64_t Arranged::floats(const FewTokens& tokens, int64_t columns) const {
    return tokens.count * ((wide_ ? columns : 0) + (chunks_ ? whole_chunks(columns) : 0));
}

void Arranged::fill(FewTokens* tokens, int64_t columns, float* to) const {
    const int dtype = tokens->dtype;
    if (chunks_) {
        const auto run = dtype == kFloat32   ? arrange_chunks<kFloat32>
                         : dtype == kFloat16 ? arrange_chunks<kFloat16>
                                             : arrange_chunks<kBfloat16>;
        run(*tokens, columns, to);
        tokens->chunks = to;
        to += tokens->count * whole_chunks(columns);
    }
    if (wide_) {
        const auto run = dtype == kFloat32 ? widen<kFloat32> : dtype == kFloat16 ? widen<kFloat16> : widen<kBfloat16>;
        run(*tokens, columns, to);
        tokens->wide = to;
    }
}

FewTokensProduct::FewTokensProduct(const Source& source, const FewTokens& tokens) : source_(source), tokens_(tokens) {
    const Way way = way_of(source, tokens.count);
    decodes_ = way == Way::decoded || (way == Way::chunks ? tokens.chunks : tokens.wide) == nullptr;
}

void FewTokensProduct::add(int64_t first, int64_t count, float* sums) const {
    if (decodes_) return add_decoded(first, count, sums);
    if (is_kind(source_, SourceKind::codebook4)) return add_packed(first, count, sums);
    float found[kMaxPackedTokens];
    for (int64_t r = 0; r < count; ++r) {
        row(first + r, found);
        for (int64_t t = 0; t < tokens_.count; ++t) sums[t * kTileRows + r] += found[t];
    }
}

void FewTokensProduct::add_decoded(int64_t first, int64_t count, float* sums) const {
    alignas(64) float tile[kTileRows * kTileColumns];  // room for float32; a 16-bit tile uses half
    const auto dot = pick_dot(tokens_.dtype);
    const int64_t bytes = dtype_bytes(tokens_.dtype), all = source_.view.columns;
    if (count < kTileRows) std::memset(tile, 0, sizeof tile);
    for (int64_t k = 0; k < all; k += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, all - k);
        for (int64_t r = 0; r < count; ++r) {
            char* row = reinterpret_cast<char*>(tile) + r * kTileColumns * bytes;
            decode_row(source_, first + r, k, columns, row, tokens_.dtype);
        }
        const char* x = static_cast<const char*>(tokens_.x) + k * bytes;
        dot(tile, x, tokens_.stride, tokens_.count, columns, tokens_.dtype, sums);
    }
}

// found[t] = a row of int8 or of a GGUF's blocks times token t.
void FewTokensProduct::row(int64_t row, float* found) const {
    const SourceView& view = source_.view;
    if (is_kind(source_, SourceKind::int8)) {
        const int64_t begin = row * view.columns, end = begin + view.columns;
        return dot(symmetric_kernel(), source_.int8, begin, end, tokens_.wide, view.columns, tokens_.count, found);
    }
    const int64_t blocks = view.columns / source_.block.elements;
    const auto* in = static_cast<const uint8_t*>(view.data) + row * blocks * source_.block.bytes;
    source_.block.dot({in, blocks, tokens_.wide, view.columns, tokens_.count, found});
}

void FewTokensProduct::add_packed(int64_t first, int64_t count, float* sums) const {
    const CodebookWeight& weight = source_.codebook;
    const auto packed_dot = linear_kernel().packed_dot;
    const int64_t columns = source_.view.columns, blocks = columns / weight.block_size;  // of a row
    float scales[kTileRows * kScaleGroup];
    for (int64_t block = 0; block < blocks; block += kScaleGroup) {
        const int64_t some = std::min(kScaleGroup, blocks - block), column = block * weight.block_size;
        for (int64_t r = 0; r < count; ++r) {
            decode_scales(weight.scales, (first + r) * blocks + block, some, scales + r * kScaleGroup);
        }
        fetch_scales(weight.scales, (first + kTilesAhead * kTileRows) * blocks + block, count * some);
        const uint8_t* packed = weight.packed + (first * columns + column) / 2;
        const PackedRows rows{packed,
                              columns / 2,
                              scales,
                              kScaleGroup,
                              weight.codebook,
                              weight.block_size,
                              some * weight.block_size,
                              tokens_.chunks + column,
                              whole_chunks(columns),
                              tokens_.count};
        packed_dot(rows, count, sums);
    }
}

}  // namespace entrenar
