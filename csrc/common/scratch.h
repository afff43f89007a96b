// Buffers per thread that grow as needed and stay until the thread ends.
#pragma once

#include <cstdint>

namespace entrenar {

// `call` is for one whole operation, `work` for a thread's part in it.
enum class Scratch { work, call };

// At least `bytes` bytes, aligned to 64, valid until this thread's next request of the same kind; null if there is no
// memory.
char* thread_scratch(int64_t bytes, Scratch kind = Scratch::work);

}  // namespace entrenar
