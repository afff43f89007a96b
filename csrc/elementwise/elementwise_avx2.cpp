// The elementwise kernels, compiled for the avx2 path.
#include "elementwise/table.h"

namespace entrenar {

const Elementwise elementwise_avx2 = kElementwise;

}  // namespace entrenar
