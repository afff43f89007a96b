// The row-wise parts of attention, compiled for the avx2 path.
#include "attention/rows.h"

namespace entrenar {

const AttentionRows attention_avx2 = kAttentionRows;

}  // namespace entrenar
