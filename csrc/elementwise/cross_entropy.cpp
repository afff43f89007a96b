// Entry point of the cross-entropy over rows of logits: rows over threads, each thread with a scratch row of its own.
#include <algorithm>

#include <atomic>
#include <cstring>
#include "abi/abi.h"

#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

int64_t label_of(const void* labels, int64_t row) {
    int64_t label;
    std::memcpy(&label, static_cast<const char*>(labels) + row * 8, 8);
    return label;
}

int check_labels(const void* labels, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        if (label_of(labels, row) < 0 || label_of(labels, row) >= columns) return kBadArgument;
    }
    return kOk;
}

}  // namespace
}  // namespace entrenar

// logits: (rows, columns) of dtype, overwritten by the gradient of the sum of the losses if `gradient`; labels: (rows,)
// int64; losses: (rows,) float32; softcap: 0 for none.
ENTRENAR_API int entrenar_cross_entropy(void* logits, int64_t logits_bytes, const void* labels, int64_t labels_bytes,
                                        void* losses, int64_t losses_bytes, int64_t rows, int64_t columns,
                                        float softcap, int gradient, int dtype, int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (!(softcap >= 0.0f)) return kBadArgument;
    int64_t elements = 0;
    if (!multiply(rows, columns, &elements)) return kBadSize;
    if (const int error = check_buffer(logits, logits_bytes, elements, dtype_bytes(dtype))) return error;
    if (const int error = check_buffer(labels, labels_bytes, rows, 8)) return error;
    if (const int error = check_buffer(losses, losses_bytes, rows, 4)) return error;
    if (const int error = check_labels(labels, rows, columns)) return error;
    const Elementwise& kernel = elementwise();
    const int64_t row_bytes = columns * dtype_bytes(dtype);
    const int64_t grain = std::max<int64_t>(kGrainElements / std::max<int64_t>(columns, 1), 1);
    std::atomic<int> outcome{kOk};
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        float* scratch = nullptr;
        if (gradient) scratch = reinterpret_cast<float*>(thread_scratch(cross_entropy_scratch(columns) * 4));
        if (gradient && !scratch) return outcome.store(kNoMemory);
        for (int64_t row = begin; row < end; ++row) {
            const float loss = kernel.cross_entropy(static_cast<char*>(logits) + row * row_bytes, columns,
                                                    label_of(labels, row), softcap, dtype, scratch);
            store_element(losses, kFloat32, row, loss);
        }
    });
    return outcome.load();
}
