// Attention's backward: the scores once more, keys by rows, so that both gradients that sum over queries are plain
// products; the queries' gradient is summed transposed.
#include <algorithm>

#include <atomic>
#include <cstring>
#include <numeric>
#include <utility>
#include "abi/abi.h"

#include "attention/attention.h"
#include "common/errors.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

constexpr int64_t kBlock = 128;  // keys and queries at a time

struct Gradients {
    HeadsView out, grad;  // of attention's result, both (B, T, H, D)
    const float* lse;     // (B, H, T)
    uint16_t *dq, *dk, *dv;
};

// One thread's room for one key-value head. Token counts are padded to whole blocks.
struct Room {
    int64_t padded;
    float *scores, *dp, *dq, *dk, *dv, *lse, *delta;
    uint16_t *p, *ds, *packed_ds, *keys, *q_columns, *q_rows, *grad_columns, *grad_rows;

    static int64_t bytes(const AttentionView& view) {
        const int64_t padded = divide_up(view.tokens, kBlock) * kBlock, matrix = padded * view.width;
        return (2 * kBlock * kBlock + 3 * matrix + 2 * padded) * 4 + (3 * kBlock * kBlock + 5 * matrix) * 2;
    }

    Room(const AttentionView& view, char* scratch) : padded(divide_up(view.tokens, kBlock) * kBlock) {
        const int64_t matrix = padded * view.width, square = kBlock * kBlock;
        auto* floats = reinterpret_cast<float*>(scratch);
        const auto take = [&floats](int64_t count) { return std::exchange(floats, floats + count); };
        scores = take(square), dp = take(square), dq = take(matrix), dk = take(matrix), dv = take(matrix);
        lse = take(padded), delta = take(padded);
        auto* halves = reinterpret_cast<uint16_t*>(floats);
        const auto take_halves = [&halves](int64_t count) { return std::exchange(halves, halves + count); };
        p = take_halves(square), ds = take_halves(square), packed_ds = take_halves(square), keys = take_halves(matrix);
        q_columns = take_halves(matrix), q_rows = take_halves(matrix);
        grad_columns = take_halves(matrix), grad_rows = take_halves(matrix);
    }
};

void prepare_head(const AttentionView& view, const AttentionKernels& kernels, const Gradients& gradients,
                  const Room& room, int64_t row, int64_t head) {
    const uint16_t *q = view.q.rows(row, head), *grad = gradients.grad.rows(row, head),
                   *out = gradients.out.rows(row, head);
    pack_rows_transposed(kernels.products, q, view.q.token, view.tokens, view.width, room.q_columns);
    pack_rows(kernels.products, q, view.q.token, view.tokens, view.width, room.q_rows);
    pack_rows_transposed(kernels.products, grad, gradients.grad.token, view.tokens, view.width, room.grad_columns);
    pack_rows(kernels.products, grad, gradients.grad.token, view.tokens, view.width, room.grad_rows);
    for (int64_t token = 0; token < view.tokens; ++token) {
        room.lse[token] = gradients.lse[(row * view.heads + head) * view.tokens + token];
        fetch_row_ahead(out + token * gradients.out.token, gradients.out.token * 2, view.width * 2);
        room.delta[token] = view.scale * kernels.rows.dot(grad + token * gradients.grad.token,
                                                          out + token * gradients.out.token, view.width);
    }
    std::memset(room.dq, 0, static_cast<size_t>(room.padded * view.width) * 4);
}

bool attends_any(const Attended& attended, int64_t key, int64_t query, int64_t tokens) {
    for (int64_t at = query; at < std::min(query + kBlock, tokens); ++at) {
        if (attended.count(at, key, key + kBlock) > 0) return true;
    }
    return false;
}

// Scores of keys that a query does not attend, though it stands between the first and the last query that does.
void leave_gaps(const Attended& attended, int64_t key, int64_t keys, int64_t query, int64_t queries, float* scores) {
    for (int64_t c = 0; c < queries; ++c) {
        const auto at = static_cast<size_t>(query + c);
        const int64_t before = std::clamp<int64_t>(attended.first[at] - key, 0, keys);
        const int64_t gap = std::clamp<int64_t>(attended.gap[at] - key, 0, keys);
        const int64_t resumed = std::clamp<int64_t>(attended.resumed[at] - key, gap, keys);
        for (int64_t r = 0; r < before; ++r) scores[r * kBlock + c] = kUnattended;
        for (int64_t r = gap; r < resumed; ++r) scores[r * kBlock + c] = kUnattended;
    }
}

// Keys [key, key + keys) against queries [query, query + kBlock): all five products.
void run_block(const AttentionView& view, const AttentionKernels& kernels, const Room& room, const Attended& attended,
               const std::vector<int64_t>& last, int64_t row, int64_t kv, int64_t key, int64_t query) {
    const int64_t keys = std::min(kBlock, view.tokens - key), queries = std::min(kBlock, view.tokens - query);
    const int64_t width = view.width, columns = packed_group(width), rows = packed_group(view.tokens);
    const int64_t query_groups = divide_up(queries, kGroup), steps = width / kStep, groups = width / kGroup;
    const uint16_t *k = view.k.rows(row, kv) + key * view.k.token, *v = view.v.rows(row, kv) + key * view.v.token;
    multiply_packed({&kernels.products, k, view.k.token, keys, room.q_columns + query / kGroup * columns, columns,
                     steps, query_groups},
                    room.scores, kBlock, false);
    multiply_packed({&kernels.products, v, view.v.token, keys, room.grad_columns + query / kGroup * columns, columns,
                     steps, query_groups},
                    room.dp, kBlock, false);
    if (attended.has_gaps()) leave_gaps(attended, key, keys, query, queries, room.scores);
    for (int64_t r = 0; r < keys; ++r) {
        const int64_t low = std::clamp<int64_t>(key + r - query, 0, queries);
        const int64_t high = std::clamp<int64_t>(last[static_cast<size_t>(key + r)] + 1 - query, low, queries);
        kernels.rows.gradient(room.scores + r * kBlock, room.dp + r * kBlock, room.lse + query, room.delta + query, low,
                              high, query_groups * kGroup, view.scale, room.p + r * kBlock, room.ds + r * kBlock);
    }
    const int64_t at = query / kStep * kStepElements;
    multiply_packed({&kernels.products, room.p, kBlock, keys, room.grad_rows + at, rows, query_groups, groups},
                    room.dv + key * width, width, true);
    multiply_packed({&kernels.products, room.ds, kBlock, keys, room.q_rows + at, rows, query_groups, groups},
                    room.dk + key * width, width, true);
    pack_rows(kernels.products, room.ds, kBlock, keys, query_groups * kGroup, room.packed_ds);
    multiply_packed({&kernels.products, room.keys + key, room.padded, width, room.packed_ds, packed_group(keys),
                     divide_up(keys, kStep), query_groups},
                    room.dq + query, room.padded, true);
}

void store_rows(const AttentionKernels& kernels, const float* from, int64_t width, int64_t tokens, uint16_t* to,
                int64_t stride) {
    kernels.products.store_bf16({to, nullptr, nullptr, stride, tokens, width}, from, width, 1.0f);
}

// The last query that attends each key, gaps aside. From the last query on, each takes the keys that no later one took;
// `next` leads past those that are taken.
std::vector<int64_t> last_queries(const std::vector<int64_t>& first) {
    const auto tokens = static_cast<int64_t>(first.size());
    std::vector<int64_t> last(first.size()), next(first.size() + 1);
    std::iota(next.begin(), next.end(), 0);
    const auto untaken = [&next](int64_t key) {
        while (next[static_cast<size_t>(key)] != key) {
            key = next[static_cast<size_t>(key)] = next[static_cast<size_t>(next[static_cast<size_t>(key)])];
        }
        return key;
    };
    for (int64_t query = tokens - 1; query >= 0; --query) {
        for (int64_t key = untaken(first[static_cast<size_t>(query)]); key <= query; key = untaken(key)) {
            last[static_cast<size_t>(key)] = query;
            next[static_cast<size_t>(key)] = key + 1;
        }
    }
    return last;
}

void run_pair(const AttentionView& view, const AttentionKernels& kernels, const Gradients& gradients, const Room& room,
              int64_t row, int64_t kv) {
    const int64_t group = view.heads / view.kv_heads, width = view.width;
    const Attended attended = attended_keys(view, row);
    const std::vector<int64_t> last = last_queries(attended.first);
    // q_rows is free until the first head: room for the packed form that the transposition goes through.
    transpose_rows(kernels.products, view.k.rows(row, kv), view.k.token, view.tokens, width, room.padded, room.q_rows,
                   room.keys);
    std::memset(room.dk, 0, static_cast<size_t>(room.padded * width) * 4);
    std::memset(room.dv, 0, static_cast<size_t>(room.padded * width) * 4);
    kernels.products.begin();
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
        prepare_head(view, kernels, gradients, room, row, head);
        for (int64_t key = 0; key < view.tokens; key += kBlock) {
            const auto end_key = last.begin() + std::min(key + kBlock, view.tokens);
            const int64_t end = *std::max_element(last.begin() + key, end_key) + 1;
            for (int64_t query = key; query < end; query += kBlock) {
                if (attended.has_gaps() && !attends_any(attended, key, query, view.tokens)) continue;
                run_block(view, kernels, room, attended, last, row, kv, key, query);
            }
        }
        const int64_t stride = view.heads * width;
        kernels.rows.store_transposed(room.dq, room.padded, view.tokens, width,
                                      gradients.dq + row * view.tokens * stride + head * width, stride);
    }
    kernels.products.end();
    const int64_t stride = view.kv_heads * width, at = row * view.tokens * stride + kv * width;
    store_rows(kernels, room.dk, width, view.tokens, gradients.dk + at, stride);
    store_rows(kernels, room.dv, width, view.tokens, gradients.dv + at, stride);
}

}  // namespace
}  // namespace entrenar

// Gradients of entrenar_attention's result `out`, given `grad` and its lse, all contiguous: dq (B, T, H, D), dk and dv
// (B, T, G, D).
int entrenar::attention_backward(const AttentionView* view, const void* out, int64_t out_bytes, const void* grad,
                                 int64_t grad_bytes, const void* lse, int64_t lse_bytes, void* dq, int64_t dq_bytes,
                                 void* dk, int64_t dk_bytes, void* dv, int64_t dv_bytes, int threads) {
    using namespace entrenar;
    const AttentionKernels kernels = attention_kernels();
    if (const int error = check_attention(*view)) return error;
    const int64_t tokens = view->batch * view->tokens, width = view->width;
    const int64_t queries = tokens * view->heads, keys = tokens * view->kv_heads;
    const struct {
        const void* data;
        int64_t bytes, items, item_bytes;
    } buffers[] = {{out, out_bytes, queries * width, 2}, {grad, grad_bytes, queries * width, 2},
                   {lse, lse_bytes, queries, 4},         {dq, dq_bytes, queries * width, 2},
                   {dk, dk_bytes, keys * width, 2},      {dv, dv_bytes, keys * width, 2}};
    for (const auto& buffer : buffers) {
        if (const int error = check_buffer(buffer.data, buffer.bytes, buffer.items, buffer.item_bytes)) return error;
    }
    const int64_t token = view->heads * width;
    const HeadsView result{out, out_bytes, view->tokens * token, token, width};
    const Gradients gradients{result,
                              {grad, grad_bytes, view->tokens * token, token, width},
                              static_cast<const float*>(lse),
                              static_cast<uint16_t*>(dq),
                              static_cast<uint16_t*>(dk),
                              static_cast<uint16_t*>(dv)};
    std::atomic<int> error{kOk};
    parallel_items(view->batch * view->kv_heads, threads, [&](int64_t item) {
        char* scratch = thread_scratch(Room::bytes(*view));
        if (scratch == nullptr) return error.store(kNoMemory);
        run_pair(*view, kernels, gradients, Room(*view, scratch), item / view->kv_heads, item % view->kv_heads);
    });
    return error.load();
}

ENTRENAR_API int entrenar_attention_backward(const entrenar::AttentionView* view, const void* out, int64_t out_bytes,
                                             const void* grad, int64_t grad_bytes, const void* lse, int64_t lse_bytes,
                                             void* dq, int64_t dq_bytes, void* dk, int64_t dk_bytes, void* dv,
                                             int64_t dv_bytes, int threads) {
    return entrenar::attention_backward(view, out, out_bytes, grad, grad_bytes, lse, lse_bytes, dq, dq_bytes, dk,
                                        dk_bytes, dv, dv_bytes, threads);
}
