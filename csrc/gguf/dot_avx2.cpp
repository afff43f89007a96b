// The dot products, compiled for the avx2 path.
#include "gguf/dot.h"

namespace entrenar::gguf {

const Dot dot_avx2 = kDot;

}  // namespace entrenar::gguf
