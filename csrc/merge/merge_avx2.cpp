// The merge kernels, compiled for the avx2 path.
#include "merge/table.h"

namespace entrenar {

const Merge merge_avx2 = kMerge;

}  // namespace entrenar
