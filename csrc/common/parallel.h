// Split [0, items) over threads.
//
// Where torch's OpenMP runtime is known (entrenar_use_gomp) its thread pool does the work: a second pool would compete
// with its workers, which wait by spinning. A small pool of our own serves in three cases: the runtime is not known;
// the process is a forked child, in which an OpenMP pool is dead; OpenMP stalls because other processes hold the cores.
//
// Threads take ranges from a shared counter, so that any number of them finishes the work. A result may therefore not
// depend on which thread computes which range.
#pragma once

#include <cstdint>

namespace entrenar {

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);

// body(context, begin, end) over disjoint ranges that cover [0, items), each a multiple of `grain` (but the last);
// grain 0: ranges of exactly one item.
void parallel_ranges(int64_t items, int64_t grain, int threads, RangeBody body, const void* context);

// The same with a lambda (begin, end).
template <class Body>
void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
    parallel_ranges(
        items, grain, threads,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
        &body);
}

// The same for items that are large pieces of work: body(item), one at a time.
template <class Body>
void parallel_items(int64_t items, int threads, const Body& body) {
    parallel_ranges(
        items, 0, threads,
        [](const void* context, int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) (*static_cast<const Body*>(context))(item);
        },
        &body);
}

}  // namespace entrenar
