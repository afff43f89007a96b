// Scratch in whole huge pages where the system gives them: a packed panel is read in strides that thrash small ones.
#include "common/scratch.h"

#include "abi/abi.h"
#include "common/errors.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace entrenar {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Buffer {
    char* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

char* thread_scratch(int64_t bytes, Scratch kind) {
    thread_local Buffer buffers[3];
    Buffer& scratch = buffers[static_cast<int>(kind)];
    if (scratch.bytes >= bytes && scratch.data != nullptr) return scratch.data;
    std::free(scratch.data);
    scratch.bytes = (bytes / kHugePage + 1) * kHugePage;
    scratch.data = static_cast<char*>(std::aligned_alloc(kHugePage, static_cast<size_t>(scratch.bytes)));
    if (scratch.data == nullptr) scratch.bytes = 0;
#if defined(__linux__)
    else
        madvise(scratch.data, static_cast<size_t>(scratch.bytes), MADV_HUGEPAGE);  // a wish: failing costs speed only
#endif
    return scratch.data;
}

}  // namespace entrenar

// Where `bytes` bytes of this thread's scratch for blocks lie: until its next request, a block's included.
ENTRENAR_API int entrenar_scratch(int64_t bytes, void** address) {
    using namespace entrenar;
    if (bytes < 0 || bytes > int64_t{1} << 56) return kBadSize;
    *address = thread_scratch(bytes, Scratch::block);
    return *address ? kOk : kNoMemory;
}
