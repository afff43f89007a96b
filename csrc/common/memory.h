// Huge pages for what malloc's heap grows by (memory.cpp).
#pragma once

namespace entrenar {

// Ask the system to back what the heap has grown by since the last call with huge pages; nothing until
// entrenar_use_huge_pages was called. No system call where the heap has not grown.
void advise_new_heap();

}  // namespace entrenar
