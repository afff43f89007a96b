// The elementwise kernels, compiled for the avx512 path.
#include "elementwise/table.h"

namespace entrenar {

const Elementwise elementwise_avx512 = kElementwise;

}  // namespace entrenar
