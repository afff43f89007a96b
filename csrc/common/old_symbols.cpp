// What GCC 11 and later call in libstdc++ and older ones have not got (old_symbols.h).
#include <new>

#if defined(__GLIBCXX__) && defined(__linux__)
namespace std {
// GCC declares it in <bits/functexcept.h>; without a definition here it would be GLIBCXX_3.4.29's.
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
