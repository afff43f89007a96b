// The driver of matmul.h: checks, panels, packing, passes over a long inner dimension, and the threads.
#include "matmul/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

// A packed panel stays in the second cache beside the rows of A that pass by.
constexpr int64_t kPanelBytes = 1200 << 10;
constexpr int64_t kPanelColumns = 256;  // narrower panels read A too often, wider ones leave the cache sooner
constexpr int64_t kChunkRows = 2048;    // rows of A at a time: bounds the scratch of partial sums

// One product of the sum, checked: op(B) is (K, N), B itself or, `transposed`, the (N, K) it is the transpose of.
struct Term {
    const char* a;
    int64_t a_stride;  // bytes
    int64_t inner;     // K
    bool transposed;
    Source source;
};

struct Sum {
    int64_t rows, columns;
    std::vector<Term> terms;
    void* out;
    int64_t out_stride;  // elements
    int out_dtype;
    float alpha;
    const uint16_t* bias;
};

// A stretch of a term's inner dimension, a whole number of steps but for a term's end.
struct Piece {
    const Term* term;
    int64_t begin, end;
    int64_t steps() const { return divide_up(end - begin, kStep); }
};

using Pass = std::vector<Piece>;

// Cut the terms into passes of at most `most` steps each, evenly.
std::vector<Pass> make_passes(const std::vector<Term>& terms, int64_t most) {
    int64_t total = 0;
    for (const Term& term : terms) total += divide_up(term.inner, kStep);
    const int64_t each = divide_up(total, std::max<int64_t>(divide_up(total, most), 1));
    std::vector<Pass> passes(1);
    int64_t room = each;
    for (const Term& term : terms) {
        for (int64_t begin = 0; begin < term.inner;) {
            if (room == 0) {
                passes.emplace_back();
                room = each;
            }
            const int64_t end = std::min(term.inner, begin + room * kStep);
            passes.back().push_back({&term, begin, end});
            room -= divide_up(end - begin, kStep);
            begin = end;
        }
    }
    return passes;
}

// Columns [column, column + groups · 32) of one piece into group-major order at `to`; see matmul.h.
void pack_transposed(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups, int64_t group_elements, uint16_t* to) {
    constexpr int64_t kChunk = 512;  // sixteen rows of this fit the first cache
    alignas(64) uint16_t rows[kStrip * kChunk];
    for (int64_t strip = 0; strip < groups * 2; ++strip) {
        uint16_t* strip_at = to + strip / 2 * group_elements + strip % 2 * (kStepElements / 2);
        for (int64_t k = piece.begin; k < piece.end; k += kChunk) {
            const int64_t count = std::min(kChunk, divide_up(piece.end - k, kStep) * kStep);
            for (int64_t r = 0; r < kStrip; ++r) {
                piece.term->source.decode(column + strip * kStrip + r, k, count, rows + r * kChunk);
            }
            for (int64_t step = 0; step < count / kStep; ++step, strip_at += kStepElements) {
                kernel.pack_transposed(rows + step * kStep, kChunk, strip_at);
            }
        }
    }
}

void pack_straight(const MatmulKernel& kernel, const Piece& piece, int64_t column, int64_t groups, int64_t group_elements, uint16_t* to) {
    constexpr int64_t kChunk = 2048;
    alignas(64) uint16_t two[2][kChunk];
    for (int64_t first = 0; first < groups * kGroup; first += kChunk) {
        const int64_t count = std::min(kChunk, groups * kGroup - first);
        for (int64_t pair = 0; pair < piece.steps() * (kStep / 2); ++pair) {
            const int64_t k = piece.begin + pair * 2;
            piece.term->source.decode(k, column + first, count, two[0]);
            piece.term->source.decode(k + 1, column + first, count, two[1]);
            for (int64_t at = 0; at < count; at += kStrip) {
                const int64_t strip = (first + at) / kStrip;
                uint16_t* strip_at = to + strip / 2 * group_elements + strip % 2 * (kStepElements / 2);
                strip_at += pair / 16 * kStepElements + pair % 16 * 2 * kStrip;
                kernel.pack_pair(two[0] + at, two[1] + at, strip_at);
            }
        }
    }
}

// The rows of A that a piece multiplies. Where the last step would read past a row's end, a copy with zeros behind it.
class Tails {
public:
    Tails(const Pass& pass, int64_t row, int64_t rows) : row_(row) {
        for (const Piece& piece : pass) {
            const int64_t rest = (piece.end - piece.begin) % kStep;
            if (rest == 0) continue;
            copies_.emplace_back(static_cast<size_t>(rows * kStep), uint16_t{0});
            const char* from = piece.term->a + row * piece.term->a_stride + (piece.end - rest) * 2;
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(copies_.back().data() + r * kStep, from + r * piece.term->a_stride, static_cast<size_t>(rest) * 2);
            }
        }
    }

    // Runs for the block of rows that begins at `row`, with B's first group at `b`.
    void runs(const Pass& pass, int64_t row, const uint16_t* b, std::vector<Run>* runs) const {
        runs->clear();
        size_t copy = 0;
        for (const Piece& piece : pass) {
            const int64_t whole = (piece.end - piece.begin) / kStep;
            const char* a = piece.term->a + row * piece.term->a_stride + piece.begin * 2;
            if (whole > 0) runs->push_back({a, piece.term->a_stride, b, whole});
            if (piece.steps() > whole) {
                const auto* copied = copies_[copy++].data() + (row - row_) * kStep;
                runs->push_back({reinterpret_cast<const char*>(copied), kStep * 2, b + whole * kStepElements, 1});
            }
            b += piece.steps() * kStepElements;
        }
    }

private:
    int64_t row_;
    std::vector<std::vector<uint16_t>> copies_;
};

void store(const Sum& sum, const MatmulKernel& kernel, const float* c, int64_t pitch, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    columns = std::min(columns, sum.columns - column);
    for (int64_t r = 0; r < rows; ++r, c += pitch) {
        const int64_t at = (row + r) * sum.out_stride + column;
        if (sum.out_dtype == kBfloat16) {
            const uint16_t* bias = sum.bias ? sum.bias + column : nullptr;
            kernel.store_bf16(c, sum.alpha, bias, columns, static_cast<uint16_t*>(sum.out) + at);
            continue;
        }
        float* out = static_cast<float*>(sum.out) + at;
        for (int64_t i = 0; i < columns; ++i) out[i] = c[i] * sum.alpha + (sum.bias ? bf16_to_float(sum.bias[column + i]) : 0.0f);
    }
}

struct Window {
    int64_t row, rows, column, groups;
};

// All rows of one panel in one pass: add to the partial sums, or on the last pass store them.
void run_pass(const Sum& sum, const MatmulKernel& kernel, const Pass& pass, const Window& window, const uint16_t* packed,
              int64_t group_elements, float* partial, bool first, bool last) {
    const int64_t pitch = kernel.groups * kGroup, block_elements = kernel.rows * pitch;
    const Tails tails(pass, window.row, window.rows);
    std::vector<Run> runs;
    alignas(64) float own[32 * 64];
    for (int64_t row = 0; row < window.rows; row += kernel.rows) {
        const int64_t rows = std::min(kernel.rows, window.rows - row);
        tails.runs(pass, window.row + row, packed, &runs);
        for (int64_t group = 0; group < window.groups; group += kernel.groups) {
            const int64_t groups = std::min(kernel.groups, window.groups - group);
            float* c = first && last ? own : partial;
            kernel.block(runs.data(), static_cast<int64_t>(runs.size()), rows, groups, group_elements, c, pitch, !first);
            if (last) store(sum, kernel, c, pitch, window.row + row, rows, window.column + group * kGroup, groups * kGroup);
            partial += block_elements;
            for (Run& run : runs) run.b += groups * group_elements;
        }
    }
}

int run_window(const Sum& sum, const MatmulKernel& kernel, const std::vector<Pass>& passes, const Window& window) {
    int64_t most = 0;
    for (const Pass& pass : passes) {
        int64_t steps = 0;
        for (const Piece& piece : pass) steps += piece.steps();
        most = std::max(most, steps);
    }
    const int64_t panel_bytes = window.groups * most * kStepElements * 2;
    const int64_t blocks = divide_up(window.rows, kernel.rows) * divide_up(window.groups, kernel.groups);
    const int64_t partial_bytes = passes.size() > 1 ? blocks * kernel.rows * kernel.groups * kGroup * 4 : 0;
    char* scratch = thread_scratch(panel_bytes + partial_bytes);
    if (scratch == nullptr) return kNoMemory;
    auto* packed = reinterpret_cast<uint16_t*>(scratch);
    auto* partial = reinterpret_cast<float*>(scratch + panel_bytes);
    for (const Pass& pass : passes) {
        int64_t steps = 0;
        for (const Piece& piece : pass) steps += piece.steps();
        uint16_t* to = packed;
        for (const Piece& piece : pass) {
            const auto pack = piece.term->transposed ? pack_transposed : pack_straight;
            pack(kernel, piece, window.column, window.groups, steps * kStepElements, to);
            to += piece.steps() * kStepElements;
        }
        kernel.begin();
        run_pass(sum, kernel, pass, window, packed, steps * kStepElements, partial, &pass == &passes.front(),
                 &pass == &passes.back());
        kernel.end();
    }
    return kOk;
}

// How C is cut into windows that threads take in turn: panels of columns and, where those are too few, of rows.
struct Cut {
    int64_t groups, panels, rows, chunks;
};

Cut cut(const Sum& sum, const MatmulKernel& kernel, int64_t steps, int threads) {
    const int64_t groups = divide_up(sum.columns, kGroup), share = divide_up(groups, threads);
    const int64_t fitting = std::max<int64_t>(kPanelBytes / std::max<int64_t>(steps * kStepElements * 2, 1), 1);
    const int64_t most = std::max(fitting, kPanelColumns / kGroup);
    const int64_t each = std::max<int64_t>(divide_up(share, divide_up(share, most)), 1);
    const int64_t panels = divide_up(groups, each);
    int64_t rows = std::min(sum.rows, kChunkRows);
    if (panels < threads) rows = std::min(rows, divide_up(sum.rows, divide_up(threads, panels)));
    rows = std::max<int64_t>(divide_up(rows, kernel.rows) * kernel.rows, 1);
    return {each, panels, rows, divide_up(sum.rows, rows)};
}

int multiply_sum(const Sum& sum, const MatmulKernel& kernel, int threads) {
    int64_t steps = 0;
    for (const Term& term : sum.terms) steps += divide_up(term.inner, kStep);
    const Cut windows = cut(sum, kernel, steps, std::max(threads, 1));
    const int64_t most = std::max<int64_t>(kPanelBytes / (windows.groups * kStepElements * 2), 1);
    const std::vector<Pass> passes = make_passes(sum.terms, most);
    std::atomic<int> error{kOk};
    parallel_items(windows.panels * windows.chunks, threads, [&](int64_t item) {
        const int64_t panel = item / windows.chunks, chunk = item % windows.chunks;
        const int64_t groups = divide_up(sum.columns, kGroup), first = panel * windows.groups;
        const Window window{chunk * windows.rows, std::min(windows.rows, sum.rows - chunk * windows.rows), first * kGroup,
                            std::min(windows.groups, groups - first)};
        if (const int code = run_window(sum, kernel, passes, window)) error.store(code);
    });
    return error.load();
}

}  // namespace

const MatmulKernel* matmul_kernel() {
#if defined(__x86_64__)
    if (has_amx()) return &matmul_amx;
    if (has_avx512_bf16()) return &matmul_avx512bf16;
#endif
    return nullptr;
}

}  // namespace entrenar

// One product of the sum, as ops/matmul.py passes it: A (rows, inner) bfloat16, rows `a_stride` elements apart.
struct TermView {
    const void* a;
    int64_t a_bytes, a_stride, inner;
    int32_t transposed, unused;
    entrenar::SourceView source;
};

// 1 if this CPU and path multiply bfloat16 natively, so that entrenar_multiply serves.
ENTRENAR_API int entrenar_has_multiply() { return entrenar::matmul_kernel() != nullptr; }

// out (rows, columns) of `out_dtype` (float32 or bfloat16) = alpha · Σ A·op(B) + bias; bias bfloat16 or null.
ENTRENAR_API int entrenar_multiply(const TermView* terms, int64_t count, const void* bias, int64_t bias_bytes, void* out,
                                   int64_t out_bytes, int64_t rows, int64_t columns, float alpha, int out_dtype,
                                   int threads) {
    using namespace entrenar;
    const MatmulKernel* kernel = matmul_kernel();
    if (kernel == nullptr) return kBadPath;
    if (out_dtype != kFloat32 && out_dtype != kBfloat16) return kBadDtype;
    int64_t elements = 0;
    if (!multiply(rows, columns, &elements)) return kBadSize;
    if (const int error = check_buffer(out, out_bytes, elements, dtype_bytes(out_dtype))) return error;
    if (bias != nullptr) {
        if (const int error = check_buffer(bias, bias_bytes, columns, 2)) return error;
    }
    Sum sum{rows, columns, {}, out, columns, out_dtype, alpha, static_cast<const uint16_t*>(bias)};
    for (int64_t i = 0; i < count; ++i) {
        const TermView& view = terms[i];
        int64_t reach = 0;
        if (view.inner < 0 || view.a_stride < view.inner) return kBadSize;
        if (rows > 0 && view.inner > 0) {
            if (!multiply(rows - 1, view.a_stride, &reach)) return kBadSize;
            if (__builtin_add_overflow(reach, view.inner, &reach)) return kBadSize;
        }
        if (const int error = check_buffer(view.a, view.a_bytes, reach, 2)) return error;
        sum.terms.push_back({static_cast<const char*>(view.a), view.a_stride * 2, view.inner, view.transposed != 0, {}});
        if (const int error = read_source(view.source, &sum.terms.back().source)) return error;
    }
    if (elements == 0) return kOk;
    return multiply_sum(sum, *kernel, threads);
}
