// Split [0, items) over threads.
//
// Where torch's OpenMP runtime is known (entrenar_use_gomp) its own thread pool does the work: a second pool would
// fight its spinning workers for the cores. Otherwise, and in a forked child, where an OpenMP pool is dead, a small
// pool of our own serves; also while OpenMP stalls on a busy machine. Ranges are taken from a shared counter, so any
// number of threads finishes any job, and no result may depend on how the ranges fall.
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
