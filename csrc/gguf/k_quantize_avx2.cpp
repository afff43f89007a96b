// The K quantizers, compiled for the avx2 path.
#include "gguf/k_affine.h"
#include "gguf/k_symmetric.h"

namespace entrenar::gguf {

const KQuantize k_quantize_avx2{quantize_affine<15>, quantize_affine<31>, quantize_q6_k};

}  // namespace entrenar::gguf
