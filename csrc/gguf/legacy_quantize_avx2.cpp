// The legacy types' quantizers, compiled for the avx2 path.
#include "gguf/legacy_quantize.h"

namespace entrenar::gguf {

const LegacyQuantize legacy_quantize_avx2 = kLegacyQuantize;

}  // namespace entrenar::gguf
