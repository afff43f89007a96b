// The table of kernels of the path whose file includes this.
#pragma once

#include "merge/blocks.h"
#include "merge/ranks.h"
#include "merge/sums.h"

namespace entrenar {
namespace {

constexpr Merge kMerge = {histogram,     between,    keep_top,     keep_random, keep_by_rank,
                          absolute_sums, non_finite, weighted_sum, task_sum,    gram};

}  // namespace
}  // namespace entrenar
