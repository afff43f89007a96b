// The driver of sum.h: windows of C for the threads, passes over a long inner dimension, slices that stay in the first
// cache.
#include "matmul/sum.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

// A packed panel stays in the second cache while rows of A stream through it.
constexpr int64_t kPanelBytes = 1200 << 10;
constexpr int64_t kPanelGroups = 8;   // narrower panels read A too often, wider ones leave the cache sooner
constexpr int64_t kChunkRows = 2048;  // rows of A at a time: bounds the scratch of partial sums
// In a short pass the rows of A and the panel's group of so many steps, and the block of C, share the first cache; over
// a longer one the block's way out of it and back costs more than that saves.
constexpr int64_t kSliceSteps = 11, kShortPass = 56;

using Pass = std::vector<Piece>;

int64_t steps_of(const Pass& pass) {
    int64_t steps = 0;
    for (const Piece& piece : pass) steps += piece.steps();
    return steps;
}

// Cut the terms into passes of at most `most` steps each, evenly.
std::vector<Pass> make_passes(const std::vector<Term>& terms, int64_t most) {
    int64_t total = 0;
    for (const Term& term : terms) total += divide_up(term.inner, kStep);
    const int64_t steps_a_pass = divide_up(total, std::max<int64_t>(divide_up(total, most), 1));
    std::vector<Pass> passes(1);
    int64_t room = steps_a_pass;
    for (const Term& term : terms) {
        for (int64_t begin = 0; begin < term.inner;) {
            if (room == 0) {
                passes.emplace_back();
                room = steps_a_pass;
            }
            const int64_t end = std::min(term.inner, begin + room * kStep);
            passes.back().push_back({&term, begin, end});
            room -= divide_up(end - begin, kStep);
            begin = end;
        }
    }
    return passes;
}

// The rows of A that a pass multiplies. Where the last step would read past a row's end, a copy with zeros behind it.
class Rows {
public:
    Rows(const Pass& pass, int64_t row, int64_t rows) : pass_(pass), row_(row) {
        for (const Piece& piece : pass) {
            const int64_t rest = (piece.end - piece.begin) % kStep;
            if (rest == 0) continue;
            copies_.emplace_back(static_cast<size_t>(rows * kStep), uint16_t{0});
            const uint16_t* from = piece.term->a + row * piece.term->a_stride + piece.end - rest;
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(copies_.back().data() + r * kStep, from + r * piece.term->a_stride,
                            static_cast<size_t>(rest) * 2);
            }
        }
    }

    // Runs for the block of rows that begins at `row`, with B's first group at `b`; cut after every `most` steps, where
    // `ends` counts the runs so far.
    void runs(int64_t row, const uint16_t* b, int64_t most, std::vector<Run>* runs, std::vector<int64_t>* ends) const {
        runs->clear();
        ends->clear();
        int64_t room = most;
        const auto add = [&](const uint16_t* a, int64_t stride, int64_t steps) {
            while (steps > 0) {
                if (room == 0) {
                    ends->push_back(static_cast<int64_t>(runs->size()));
                    room = most;
                }
                const int64_t now = std::min(steps, room);
                runs->push_back({reinterpret_cast<const char*>(a), stride * 2, b, now});
                a += now * kStep;
                b += now * kStepElements;
                steps -= now;
                room -= now;
            }
        };
        size_t copy = 0;
        for (const Piece& piece : pass_) {
            const int64_t whole = (piece.end - piece.begin) / kStep;
            add(piece.term->a + row * piece.term->a_stride + piece.begin, piece.term->a_stride, whole);
            if (piece.steps() > whole) add(copies_[copy++].data() + (row - row_) * kStep, kStep, 1);
        }
        ends->push_back(static_cast<int64_t>(runs->size()));
    }

private:
    const Pass& pass_;
    int64_t row_;
    std::vector<std::vector<uint16_t>> copies_;
};

void store_transposed(const Sum& sum, const float* c, int64_t pitch, int64_t row, int64_t rows, int64_t column,
                      int64_t columns) {
    auto* out = static_cast<float*>(sum.out.data) + column * sum.out.stride + row;
    for (int64_t i = 0; i < columns; ++i, out += sum.out.stride) {
        for (int64_t r = 0; r < rows; ++r) out[r] = c[r * pitch + i] * sum.alpha;
    }
}

// A block of C into the output.
void store(const MatmulKernel& kernel, const Sum& sum, const float* c, int64_t pitch, int64_t row, int64_t rows,
           int64_t column, int64_t columns) {
    columns = std::min(columns, sum.columns - column);
    rows = std::min(rows, sum.out.row_limit - row);
    if (sum.out.transposed) return store_transposed(sum, c, pitch, row, rows, column, columns);
    const int64_t first = row * sum.out.stride + column;
    const uint16_t* bias = sum.bias ? sum.bias + column : nullptr;
    if (sum.out.dtype == kBfloat16) {
        const uint16_t* residual = sum.residual ? sum.residual + first : nullptr;
        auto* out = static_cast<uint16_t*>(sum.out.data) + first;
        return kernel.store_bf16({out, bias, residual, sum.out.stride, rows, columns}, c, pitch, sum.alpha);
    }
    for (int64_t r = 0; r < rows; ++r, c += pitch) {
        float* out = static_cast<float*>(sum.out.data) + first + r * sum.out.stride;
        if (!sum.out.rows.empty()) {
            out = sum.out.rows[static_cast<size_t>(row + r)];
            if (out == nullptr) continue;
            out += column;
        }
        for (int64_t i = 0; i < columns; ++i) out[i] = c[i] * sum.alpha + (bias ? bf16_to_float(bias[i]) : 0.0f);
    }
}

struct Window {
    int64_t row, rows, column, groups;
};

// One pass over one window: `c` has room for a block of rows of the whole window, or, where there are several passes,
// for all of its rows.
struct WindowPass {
    const MatmulKernel& kernel;
    const Sum& sum;
    const Window& window;
    const uint16_t* packed;
    int64_t group_elements;
    bool first, last;

    // A block of rows over all groups, slice by slice; each block of C is stored after its last slice.
    void run_rows(const std::vector<Run>& runs, const std::vector<int64_t>& ends, int64_t row, int64_t rows,
                  float* c) const {
        const int64_t pitch = kernel.groups * kGroup, block = kernel.rows * pitch;
        const bool reuse = ends.size() == 1 && first && last;  // one block of C at a time, which is then in the cache
        for (size_t slice = 0; slice < ends.size(); ++slice) {
            const int64_t from = slice ? ends[slice - 1] : 0;
            const bool add = slice > 0 || !first, done = slice + 1 == ends.size() && last;
            float* at = c;
            for (int64_t group = 0; group < window.groups; group += kernel.groups, at += reuse ? 0 : block) {
                const int64_t groups = std::min(kernel.groups, window.groups - group);
                const int64_t columns = std::min(groups * kGroup, sum.columns - window.column - group * kGroup);
                kernel.block(runs.data() + from, ends[slice] - from, rows, divide_up(columns, kStrip),
                             group * group_elements, group_elements, at, pitch, add);
                if (done) store(kernel, sum, at, pitch, row, rows, window.column + group * kGroup, groups * kGroup);
            }
        }
    }

    void run(const Pass& pass, float* c) const {
        const Rows rows(pass, window.row, window.rows);
        const int64_t steps = steps_of(pass),
                      slices = steps <= kShortPass ? std::max<int64_t>(divide_up(steps, kSliceSteps), 1) : 1;
        const int64_t window_blocks = divide_up(window.groups, kernel.groups);
        std::vector<Run> runs;
        std::vector<int64_t> ends;
        for (int64_t row = 0; row < window.rows; row += kernel.rows) {
            rows.runs(window.row + row, packed, std::max<int64_t>(divide_up(steps, slices), 1), &runs, &ends);
            run_rows(runs, ends, window.row + row, std::min(kernel.rows, window.rows - row), c);
            if (!(first && last)) c += window_blocks * kernel.rows * kernel.groups * kGroup;
        }
    }
};

int run_window(const MatmulKernel& kernel, const Sum& sum, const std::vector<Pass>& passes, const Window& window) {
    int64_t most = 0;
    for (const Pass& pass : passes) most = std::max(most, steps_of(pass));
    const int64_t panel_bytes = window.groups * most * kStepElements * 2;
    const int64_t row_blocks = passes.size() > 1 ? divide_up(window.rows, kernel.rows) : 1;
    const int64_t blocks = row_blocks * divide_up(window.groups, kernel.groups);
    char* scratch = thread_scratch(panel_bytes + blocks * kernel.rows * kernel.groups * kGroup * 4);
    if (scratch == nullptr) return kNoMemory;
    auto* packed = reinterpret_cast<uint16_t*>(scratch);
    auto* c = reinterpret_cast<float*>(scratch + panel_bytes);
    for (const Pass& pass : passes) {
        const int64_t group_elements = steps_of(pass) * kStepElements;
        uint16_t* to = packed;
        for (const Piece& piece : pass) {
            pack_piece(kernel, piece, window.column, window.groups, group_elements, to);
            to += piece.steps() * kStepElements;
        }
        kernel.begin();
        WindowPass{kernel, sum, window, packed, group_elements, &pass == &passes.front(), &pass == &passes.back()}.run(
            pass, c);
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
    const int64_t fitting = kPanelBytes / std::max<int64_t>(steps * kStepElements * 2, 1);
    const int64_t most = std::max(fitting, kPanelGroups);
    const int64_t panel_groups = std::max<int64_t>(divide_up(share, divide_up(share, most)), 1);
    const int64_t panels = divide_up(groups, panel_groups);
    int64_t rows = std::min(sum.rows, kChunkRows);
    if (panels < threads) rows = std::min(rows, divide_up(sum.rows, divide_up(threads, panels)));
    rows = std::max<int64_t>(divide_up(rows, kernel.rows) * kernel.rows, 1);
    return {panel_groups, panels, rows, divide_up(sum.rows, rows)};
}

// A sum with how it is cut; its windows are items [begin, begin + panels · chunks) of those that threads take.
struct Task {
    const Sum& sum;
    Cut windows;
    std::vector<Pass> passes;
    int64_t begin;

    int64_t end() const { return begin + windows.panels * windows.chunks; }

    int run(const MatmulKernel& kernel, int64_t item) const {
        const int64_t panel = (item - begin) / windows.chunks, chunk = (item - begin) % windows.chunks;
        const int64_t first = panel * windows.groups, row = chunk * windows.rows;
        const int64_t groups = std::min(windows.groups, divide_up(sum.columns, kGroup) - first);
        return run_window(kernel, sum, passes, {row, std::min(windows.rows, sum.rows - row), first * kGroup, groups});
    }
};

Task make_task(const MatmulKernel& kernel, const Sum& sum, int64_t begin, int threads) {
    int64_t steps = 0;
    for (const Term& term : sum.terms) steps += divide_up(term.inner, kStep);
    const Cut windows = cut(sum, kernel, steps, threads);
    const int64_t most = std::max<int64_t>(kPanelBytes / (windows.groups * kStepElements * 2), 1);
    return {sum, windows, make_passes(sum.terms, most), begin};
}

}  // namespace

int multiply_sums(const MatmulKernel& kernel, const std::vector<Sum>& sums, int threads) {
    threads = std::max(threads, 1);
    std::vector<Task> tasks;
    int64_t items = 0;
    for (const Sum& sum : sums) {
        if (sum.rows == 0 || sum.columns == 0) continue;
        tasks.push_back(make_task(kernel, sum, items, threads));
        items = tasks.back().end();
    }
    std::atomic<int> error{kOk};
    parallel_items(items, threads, [&](int64_t item) {
        const auto first =
            std::find_if(tasks.begin(), tasks.end(), [item](const Task& task) { return item < task.end(); });
        if (const int code = first->run(kernel, item)) error.store(code);
    });
    return error.load();
}

}  // namespace entrenar
