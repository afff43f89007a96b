// Buffers per thread that grow as needed and stay until the thread ends.
#pragma once

#include <cstdint>

namespace entrenar {

// `work` is for a thread's part in an operation, `call` for the whole of one, `block` for one made of several, in C++
// or by whoever calls entrenar_scratch.
enum class Scratch { work, call, block };

// At least `bytes` bytes, aligned to 64, valid until this thread's next request of the same kind; null if there is no
// memory.
char* thread_scratch(int64_t bytes, Scratch kind = Scratch::work);

}  // namespace entrenar
