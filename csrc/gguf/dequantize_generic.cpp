// The dequantizers, compiled for the generic path.
#include "gguf/dequantize.h"

namespace entrenar::gguf {

const Dequantize dequantize_generic = kDequantize;

}  // namespace entrenar::gguf
