// Entry points of the gated activations: elements over threads.
#include "common/errors.h"

#include "abi/abi.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

}  // namespace
}  // namespace entrenar

// gate, up, out: count elements of dtype; kind: elementwise/kernels.h's Activation.
int entrenar::gated_activation(const void* gate, int64_t gate_bytes, const void* up, int64_t up_bytes, void* out,
                               int64_t out_bytes, int64_t count, int kind, int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (!is_activation(kind)) return kBadArgument;
    const int64_t bytes = dtype_bytes(dtype);
    if (const int error = check_buffer(gate, gate_bytes, count, bytes)) return error;
    if (const int error = check_buffer(up, up_bytes, count, bytes)) return error;
    if (const int error = check_buffer(out, out_bytes, count, bytes)) return error;
    const Elementwise& kernel = elementwise();
    parallel_for(count, kGrainElements, threads, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * bytes;
        kernel.gated(static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at, end - begin, kind,
                     static_cast<char*>(out) + at, dtype);
    });
    return kOk;
}

ENTRENAR_API int entrenar_gated_activation(const void* gate, int64_t gate_bytes, const void* up, int64_t up_bytes,
                                           void* out, int64_t out_bytes, int64_t count, int kind, int dtype,
                                           int threads) {
    return entrenar::gated_activation(gate, gate_bytes, up, up_bytes, out, out_bytes, count, kind, dtype, threads);
}

// grad, gate, up, dgate, dup: count elements of dtype; dgate and dup may be grad, gate or up.
int entrenar::gated_activation_backward(const void* grad, int64_t grad_bytes, const void* gate, int64_t gate_bytes,
                                        const void* up, int64_t up_bytes, void* dgate, int64_t dgate_bytes, void* dup,
                                        int64_t dup_bytes, int64_t count, int kind, int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (!is_activation(kind)) return kBadArgument;
    const int64_t bytes = dtype_bytes(dtype);
    if (const int error = check_buffer(grad, grad_bytes, count, bytes)) return error;
    if (const int error = check_buffer(gate, gate_bytes, count, bytes)) return error;
    if (const int error = check_buffer(up, up_bytes, count, bytes)) return error;
    if (const int error = check_buffer(dgate, dgate_bytes, count, bytes)) return error;
    if (const int error = check_buffer(dup, dup_bytes, count, bytes)) return error;
    const Elementwise& kernel = elementwise();
    parallel_for(count, kGrainElements, threads, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * bytes;
        kernel.gated_backward(static_cast<const char*>(grad) + at, static_cast<const char*>(gate) + at,
                              static_cast<const char*>(up) + at, end - begin, kind, static_cast<char*>(dgate) + at,
                              static_cast<char*>(dup) + at, dtype);
    });
    return kOk;
}

ENTRENAR_API int entrenar_gated_activation_backward(const void* grad, int64_t grad_bytes, const void* gate,
                                                    int64_t gate_bytes, const void* up, int64_t up_bytes, void* dgate,
                                                    int64_t dgate_bytes, void* dup, int64_t dup_bytes, int64_t count,
                                                    int kind, int dtype, int threads) {
    return entrenar::gated_activation_backward(grad, grad_bytes, gate, gate_bytes, up, up_bytes, dgate, dgate_bytes,
                                               dup, dup_bytes, count, kind, dtype, threads);
}
