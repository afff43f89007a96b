// The dot products, compiled for the generic path.
#include "gguf/dot.h"

namespace entrenar::gguf {

const Dot dot_generic = kDot;

}  // namespace entrenar::gguf
