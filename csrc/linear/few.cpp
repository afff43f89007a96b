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

// Columns [column, column + count) of a row as the tokens' dtype, which for most kinds is bfloat16.
void decode_row(const Weight& weight, int64_t row, int64_t column, int64_t count, char* to, int dtype) {
    if (weight.kind != nullptr && weight.kind->decodes_any)
        return weight.kind->decode(weight, row, column, count, to, dtype);
    weight.decode(row, column, count, reinterpret_cast<uint16_t*>(to));
}

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

void Arranged::meet(const Weight& weight, const FewTokens& tokens) {
    const Meeting meeting = weight.meeting(tokens.count);
    wide_ = wide_ || meeting == Meeting::wide;
    chunks_ = chunks_ || meeting == Meeting::chunks;
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

FewTokensProduct::FewTokensProduct(const Weight& weight, const FewTokens& tokens) : weight_(weight), tokens_(tokens) {
    const Meeting meeting = weight.meeting(tokens.count);
    decodes_ = meeting == Meeting::decoded || (meeting == Meeting::chunks ? tokens.chunks : tokens.wide) == nullptr;
}

void FewTokensProduct::add(int64_t first, int64_t count, float* sums) const {
    if (decodes_) return add_decoded(first, count, sums);
    weight_.kind->add(weight_, tokens_, first, count, sums);
}

void FewTokensProduct::add_decoded(int64_t first, int64_t count, float* sums) const {
    alignas(64) float tile[kTileRows * kTileColumns];  // room for float32; a 16-bit tile uses half
    const auto dot = pick_dot(tokens_.dtype);
    const int64_t bytes = dtype_bytes(tokens_.dtype), all = weight_.view.columns;
    if (count < kTileRows) std::memset(tile, 0, sizeof tile);
    for (int64_t k = 0; k < all; k += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, all - k);
        for (int64_t r = 0; r < count; ++r) {
            char* row = reinterpret_cast<char*>(tile) + r * kTileColumns * bytes;
            decode_row(weight_, first + r, k, columns, row, tokens_.dtype);
        }
        const char* x = static_cast<const char*>(tokens_.x) + k * bytes;
        dot(tile, x, tokens_.stride, tokens_.count, columns, tokens_.dtype, sums);
    }
}

}  // namespace entrenar
