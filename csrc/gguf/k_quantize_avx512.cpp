// The K quantizers, compiled for the avx512 path.
#include "gguf/k_affine.h"
#include "gguf/k_symmetric.h"

namespace entrenar::gguf {

const KQuantize k_quantize_avx512{quantize_affine<15>, quantize_affine<31>, quantize_q6_k};

}  // namespace entrenar::gguf
