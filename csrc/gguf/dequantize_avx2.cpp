// The dequantizers, compiled for the avx2 path.
#include "gguf/dequantize.h"

namespace entrenar::gguf {

const Dequantize dequantize_avx2 = kDequantize;

}  // namespace entrenar::gguf
