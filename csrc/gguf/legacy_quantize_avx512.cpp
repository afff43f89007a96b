// The legacy types' quantizers, compiled for the avx512 path.
#include "gguf/legacy_quantize.h"

namespace entrenar::gguf {

const LegacyQuantize legacy_quantize_avx512 = kLegacyQuantize;

}  // namespace entrenar::gguf
