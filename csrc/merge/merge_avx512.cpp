// The merge kernels, compiled for the avx512 path.
#include "merge/table.h"

namespace entrenar {

const Merge merge_avx512 = kMerge;

}  // namespace entrenar
