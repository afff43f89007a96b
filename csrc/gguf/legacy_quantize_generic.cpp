// The legacy types' quantizers, compiled for the generic path.
#include "gguf/legacy_quantize.h"

namespace entrenar::gguf {

const LegacyQuantize legacy_quantize_generic = kLegacyQuantize;

}  // namespace entrenar::gguf
