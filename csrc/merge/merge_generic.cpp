// The merge kernels, compiled for the generic path.
#include "merge/table.h"

namespace entrenar {

const Merge merge_generic = kMerge;

}  // namespace entrenar
