// Which table of elementwise kernels serves; and their float functions by themselves, for the tests.
#include "common/dispatch.h"

#include "abi/abi.h"
#include "common/errors.h"
#include "common/sizes.h"
#include "elementwise/kernels.h"

namespace entrenar {

const Elementwise& elementwise() {
    static constexpr Paths<Elementwise> kPaths{&elementwise_generic, ENTRENAR_ON_X86(&elementwise_avx2),
                                               ENTRENAR_ON_X86(&elementwise_avx512), nullptr};
    return pick(kPaths);
}

}  // namespace entrenar

// in, out: count float32; which: elementwise/kernels.h's Function.
ENTRENAR_API int entrenar_function(const void* in, int64_t in_bytes, void* out, int64_t out_bytes, int64_t count,
                                   int which) {
    using namespace entrenar;
    if (which < kExp || which > kNormalCumulative) return kBadArgument;
    if (const int error = check_buffer(in, in_bytes, count, 4)) return error;
    if (const int error = check_buffer(out, out_bytes, count, 4)) return error;
    elementwise().function(in, count, which, out);
    return kOk;
}
