// The products over float vectors, compiled for the avx2 path.
#include "matmul/vectors.h"

namespace entrenar {

const MatmulKernel matmul_avx2 = kVectorProducts;

}  // namespace entrenar
