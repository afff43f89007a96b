// glibc's malloc, tuned for a process that frees and asks again for the same large buffers at every step.
//
// By default a block of 32 MiB or more goes back to the kernel at each free, and each new one costs a page fault per
// 4 KiB: a third of a training step on a CPU. With these settings freed memory stays with the process and is reused.
#include "errors.h"

#if defined(__GLIBC__) || defined(__linux__)
#include <malloc.h>
#endif

// 1 if the thresholds were set, 0 where the allocator is not glibc's. Applies to the whole process; cannot be undone.
ENTRENAR_API int entrenar_keep_freed_memory() {
#if defined(__GLIBC__)
    constexpr int kNever = 0x7FFFFFFF;
    // No limit above 32 MiB is accepted for M_MMAP_THRESHOLD, and a weight is larger: so no mmap at all.
    return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, kNever) && mallopt(M_TOP_PAD, 64 << 20);
#else
    return 0;
#endif
}
