// glibc's malloc, tuned for a process that frees and asks again for the same large buffers at every step.
//
// By default a block of 32 MiB or more goes back to the kernel at each free, and each new one costs a page fault per
// 4 KiB: a third of a training step on a CPU. With these settings freed memory stays with the process and is reused.
// What a training process allocates besides lies in huge pages, where the system gives them to who asks: passes over
// megabytes thrash the table of small ones.
#include "memory.h"

#include <atomic>
#include "abi/abi.h"

#include "errors.h"

#if defined(__GLIBC__) || defined(__linux__)
#include <malloc.h>
#endif
#if defined(__GLIBC__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace entrenar {

#if defined(__GLIBC__)
namespace {

std::atomic<char*> advised_until{nullptr};  // null: nobody asked for huge pages

char* heap_end() { return static_cast<char*>(sbrk(0)); }

}  // namespace

void advise_new_heap() {
    char* done = advised_until.load(std::memory_order_relaxed);
    if (done == nullptr) return;
    char* const end = heap_end();
    if (end <= done || !advised_until.compare_exchange_strong(done, end)) return;
    madvise(done, static_cast<size_t>(end - done), MADV_HUGEPAGE);  // a wish: failing costs speed only
}
#else
void advise_new_heap() {}
#endif

}  // namespace entrenar

// 1 if the thresholds were set, 0 where the allocator is not glibc's. Applies to the whole process; cannot be undone.
ENTRENAR_API int entrenar_keep_freed_memory() {
#if defined(__GLIBC__)
    constexpr int kNever = -1;
    // No limit above 32 MiB is accepted for M_MMAP_THRESHOLD, and a weight is larger: so no mmap at all.
    return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, kNever) && mallopt(M_TOP_PAD, 64 << 20);
#else
    return 0;
#endif
}

// From now on what malloc's heap grows by is asked for in huge pages.
ENTRENAR_API void entrenar_use_huge_pages() {
#if defined(__GLIBC__)
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto end = reinterpret_cast<uintptr_t>(entrenar::heap_end());
    char* unset = nullptr;
    entrenar::advised_until.compare_exchange_strong(unset, reinterpret_cast<char*>(end / page * page));
#endif
}
