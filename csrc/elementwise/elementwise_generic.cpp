// The elementwise kernels, compiled for the generic path.
#include "elementwise/table.h"

namespace entrenar {

const Elementwise elementwise_generic = kElementwise;

}  // namespace entrenar
