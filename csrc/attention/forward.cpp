// Attention's forward: 32 queries at a time past the keys in chunks, with a running maximum and sum a row.
#include <algorithm>

#include <atomic>
#include <cmath>
#include "abi/abi.h"

#include "attention/attention.h"
#include "common/errors.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

constexpr int64_t kQueries = 32, kKeys = 256;

// One thread's room for one key-value head.
struct Room {
    uint16_t *keys, *values, *p;
    float *scores, *o;

    static int64_t bytes(const AttentionView& view) {
        const int64_t packed = packed_elements(view.width, view.tokens) + packed_elements(view.tokens, view.width);
        return (packed + kQueries * kKeys) * 2 + (kQueries * kKeys + kQueries * view.width) * 4 + 256;
    }

    Room(const AttentionView& view, char* scratch) {
        scores = reinterpret_cast<float*>(scratch);
        o = scores + kQueries * kKeys;
        p = reinterpret_cast<uint16_t*>(o + kQueries * view.width);
        keys = p + kQueries * kKeys;
        values = keys + packed_elements(view.width, view.tokens);
    }
};

struct Outputs {
    uint16_t* out;  // (B, T, H, D)
    float* lse;     // (B, H, T)
};

// Whether any query of [begin, end) attends any key of the chunk that begins at `key`.
bool attends_any(const Attended& attended, int64_t begin, int64_t end, int64_t key) {
    for (int64_t query = begin; query < end; ++query) {
        if (attended.count(query, key, key + kKeys) > 0) return true;
    }
    return false;
}

// Take a query's gap out of its keys [low, high) of a chunk: by a bound where it lies at one, else by its scores.
void leave_gap(const Attended& attended, int64_t query, int64_t key, int64_t* low, int64_t* high, float* scores) {
    const auto at = static_cast<size_t>(query);
    const int64_t gap = std::clamp(attended.gap[at] - key, *low, *high);
    const int64_t resumed = std::clamp(attended.resumed[at] - key, gap, *high);
    if (gap == *low) {
        *low = resumed;
    } else if (resumed == *high) {
        *high = gap;
    } else {
        std::fill(scores + gap, scores + resumed, kUnattended);
    }
}

// Queries [begin, end) of one head.
void run_queries(const AttentionView& view, const AttentionKernels& kernels, const Room& room, const Outputs& outputs,
                 const Attended& attended, int64_t row, int64_t head, int64_t begin, int64_t end) {
    const int64_t rows = end - begin, width = view.width;
    const uint16_t* queries = view.q.rows(row, head) + begin * view.q.token;
    RowState states[kQueries];
    for (RowState& state : states) state = {-INFINITY, 0.0f};
    const auto first = attended.first.begin();
    const int64_t from = *std::min_element(first + begin, first + end) / kStep * kStep;
    bool is_later = false;  // whether `o` holds a sum
    for (int64_t key = from; key < end; key += kKeys) {
        if (attended.has_gaps() && !attends_any(attended, begin, end, key)) continue;
        const int64_t groups = divide_up(std::min(kKeys, end - key), kGroup);
        const PackedProduct score{
            &kernels.products,   queries,       view.q.token, rows, room.keys + key / kGroup * packed_group(width),
            packed_group(width), width / kStep, groups};
        multiply_packed(score, room.scores, kKeys, false);
        for (int64_t r = 0; r < rows; ++r) {
            int64_t low = std::clamp<int64_t>(first[begin + r] - key, 0, kKeys);
            int64_t high = std::clamp<int64_t>(begin + r + 1 - key, low, kKeys);
            if (attended.has_gaps()) leave_gap(attended, begin + r, key, &low, &high, room.scores + r * kKeys);
            kernels.rows.softmax(room.scores + r * kKeys, low, high, groups * kGroup, view.scale, &states[r],
                                 room.o + r * width, width, room.p + r * kKeys);
        }
        const PackedProduct value{
            &kernels.products,         room.p, kKeys,         rows, room.values + key / kStep * kStepElements,
            packed_group(view.tokens), groups, width / kGroup};
        multiply_packed(value, room.o, width, is_later);
        is_later = true;
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = begin + r;
        uint16_t* to = outputs.out + ((row * view.tokens + token) * view.heads + head) * width;
        kernels.rows.finish(room.o + r * width, states[r].sum, width, to);
        outputs.lse[(row * view.heads + head) * view.tokens + token] = states[r].maximum + std::log(states[r].sum);
    }
}

}  // namespace
}  // namespace entrenar

// out (B, T, H, D) bfloat16 and lse (B, H, T) float32, the logarithm of each row's sum of exponentials.
int entrenar::attention_forward(const AttentionView* view, void* out, int64_t out_bytes, void* lse, int64_t lse_bytes,
                                int threads) {
    using namespace entrenar;
    const AttentionKernels kernels = attention_kernels();
    if (const int error = check_attention(*view)) return error;
    const int64_t rows = view->batch * view->tokens * view->heads;
    if (const int error = check_buffer(out, out_bytes, rows * view->width, 2)) return error;
    if (const int error = check_buffer(lse, lse_bytes, rows, 4)) return error;
    const Outputs outputs{static_cast<uint16_t*>(out), static_cast<float*>(lse)};
    // A thread packs the keys and values it needs; where heads are few, several share a head and take its blocks in
    // turn.
    const int64_t pairs = view->batch * view->kv_heads, blocks = divide_up(view->tokens, kQueries);
    const int64_t shares = std::clamp<int64_t>(divide_up(2 * threads, pairs), 1, blocks),
                  group = view->heads / view->kv_heads;
    std::atomic<int> error{kOk};
    parallel_items(pairs * shares, threads, [&](int64_t item) {
        const int64_t pair = item / shares, row = pair / view->kv_heads, kv = pair % view->kv_heads;
        char* scratch = thread_scratch(Room::bytes(*view));
        if (scratch == nullptr) return error.store(kNoMemory);
        const Room room(*view, scratch);
        pack_rows_transposed(kernels.products, view->k.rows(row, kv), view->k.token, view->tokens, view->width,
                             room.keys);
        pack_rows(kernels.products, view->v.rows(row, kv), view->v.token, view->tokens, view->width, room.values);
        const Attended attended = attended_keys(*view, row);
        kernels.products.begin();
        for (int64_t block = item % shares; block < blocks; block += shares) {
            const int64_t begin = block * kQueries, end = std::min(begin + kQueries, view->tokens);
            for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
                run_queries(*view, kernels, room, outputs, attended, row, head, begin, end);
            }
        }
        kernels.products.end();
    });
    return error.load();
}

ENTRENAR_API int entrenar_attention(const entrenar::AttentionView* view, void* out, int64_t out_bytes, void* lse,
                                    int64_t lse_bytes, int threads) {
    return entrenar::attention_forward(view, out, out_bytes, lse, lse_bytes, threads);
}
