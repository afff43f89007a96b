// The row-wise parts of attention, compiled for the generic path.
#include "attention/rows.h"

namespace entrenar {

const AttentionRows attention_generic = kAttentionRows;

}  // namespace entrenar
