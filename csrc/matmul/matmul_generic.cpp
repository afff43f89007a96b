// The products over float vectors, compiled for the generic path.
#include "matmul/vectors.h"

namespace entrenar {

const MatmulKernel matmul_generic = kVectorProducts;

}  // namespace entrenar
