// The dequantizers, compiled for the avx512 path.
#include "gguf/dequantize.h"

namespace entrenar::gguf {

const Dequantize dequantize_avx512 = kDequantize;

}  // namespace entrenar::gguf
