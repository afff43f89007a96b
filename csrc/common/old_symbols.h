// Included before every source (CMakeLists.txt), so that a wheel built on a new Linux loads on one of 2018.
//
// The linker takes the newest version of each symbol that the building machine has, and an older system does not have
// it. Here we name the older version, which newer systems keep. `exp` and `log` compute the same numbers in both; the
// old ones also set errno.
#pragma once

#if __has_include(<features.h>)
#include <features.h>
#endif

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock,pthread_mutex_trylock@GLIBC_2.2.5");
// std::condition_variable::wait
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif
