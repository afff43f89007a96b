// A buffer per thread that grows as needed and stays until the thread ends.
#pragma once

#include <cstdint>

namespace entrenar {

// At least `bytes` bytes, aligned to 64, valid until this thread's next call; null if there is no memory.
char* thread_scratch(int64_t bytes);

}  // namespace entrenar
