// Checks of attention's arguments, and which keys a token attends.
#include "attention/attention.h"

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"
#include "common/errors.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

// Numbers a token in `starts`: its first key, or that and a gap. Their bytes say which.
int64_t numbers(const AttentionView& view) { return view.starts_bytes == view.batch * view.tokens * 3 * 4 ? 3 : 1; }

int32_t number(const AttentionView& view, int64_t row, int64_t token, int64_t which) {
    int32_t value = 0;
    const int64_t at = ((row * view.tokens + token) * numbers(view) + which) * 4;
    if (view.starts != nullptr) std::memcpy(&value, static_cast<const char*>(view.starts) + at, 4);
    return value;
}

int check_heads(const HeadsView& heads, int64_t batch, int64_t tokens, int64_t count, int64_t width) {
    const int64_t counts[3] = {batch, tokens, count}, strides[3] = {heads.batch, heads.token, heads.head};
    int64_t reach = width;
    for (int i = 0; i < 3; ++i) {
        int64_t last = 0;
        if (!multiply(counts[i] - 1, strides[i], &last) || __builtin_add_overflow(reach, last, &reach)) return kBadSize;
    }
    return check_buffer(heads.data, heads.bytes, reach, 2);
}

int check_starts(const AttentionView& view) {
    if (view.starts == nullptr) return kOk;
    const bool has_gaps = numbers(view) == 3;
    for (int64_t row = 0; row < view.batch; ++row) {
        for (int64_t token = 0; token < view.tokens; ++token) {
            const int32_t start = number(view, row, token, 0);
            const int32_t least = token && !has_gaps ? number(view, row, token - 1, 0) : 0;
            if (start < least || start > token) return kBadArgument;
            if (!has_gaps) continue;
            const int32_t gap = number(view, row, token, 1), resumed = number(view, row, token, 2);
            if (gap < 0 || gap > resumed || resumed > token) return kBadArgument;
        }
    }
    return kOk;
}

}  // namespace

int64_t Attended::count(int64_t token, int64_t begin, int64_t end) const {
    const auto at = static_cast<size_t>(token);
    begin = std::max(begin, first[at]), end = std::min(end, token + 1);
    const int64_t all = std::max<int64_t>(end - begin, 0);
    return has_gaps() ? all - std::max<int64_t>(std::min(end, resumed[at]) - std::max(begin, gap[at]), 0) : all;
}

Attended attended_keys(const AttentionView& view, int64_t row) {
    Attended keys;
    for (int64_t token = 0; token < view.tokens; ++token) {
        keys.first.push_back(number(view, row, token, 0));
        if (numbers(view) == 1) continue;
        keys.gap.push_back(number(view, row, token, 1));
        keys.resumed.push_back(number(view, row, token, 2));
    }
    return keys;
}

AttentionKernels attention_kernels() {
#if defined(__x86_64__)
    if (has_avx512_bf16()) return {matmul_kernel(), attention_avx512bf16};
#endif
    static constexpr Paths<AttentionRows> kPaths{&attention_generic, ENTRENAR_ON_X86(&attention_avx2), nullptr,
                                                 nullptr};
    return {matmul_kernel(), pick(kPaths)};
}

int check_attention_sizes(const AttentionView& view) {
    int64_t bytes = 2;  // of q, which may be more than its buffer's where strides are 0
    for (int64_t size : {view.batch, view.tokens, view.heads, view.width}) {
        if (size <= 0 || !multiply(bytes, size, &bytes)) return kBadSize;
    }
    if (view.kv_heads <= 0) return kBadSize;
    if (view.heads % view.kv_heads != 0 || view.width % kStep != 0) return kBadArgument;
    if (view.tokens > (int64_t{1} << 24) || view.width > kMaxPlainWidth) return kBadArgument;
    if (view.starts != nullptr) {
        if (const int error =
                check_buffer(view.starts, view.starts_bytes, view.batch * view.tokens * numbers(view), 4)) {
            return error;
        }
    }
    return check_starts(view);
}

int check_attention(const AttentionView& view) {
    if (const int error = check_attention_sizes(view)) return error;
    if (const int error = check_heads(view.q, view.batch, view.tokens, view.heads, view.width)) return error;
    if (const int error = check_heads(view.k, view.batch, view.tokens, view.kv_heads, view.width)) return error;
    return check_heads(view.v, view.batch, view.tokens, view.kv_heads, view.width);
}

}  // namespace entrenar
