// CPUID once, then a path that a caller may lower (tests run every path on one machine).
#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include "abi/abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "errors.h"

namespace entrenar {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx", "neon"};

#if defined(__x86_64__)
// AMX-TILE and AMX-BF16, and Linux's leave to use them: a process must ask once, for all its threads to come.
bool may_use_tiles() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}
#endif

bool supported(Path path) {
    switch (path) {
        case Path::generic:
            return true;
#if defined(__x86_64__)
        case Path::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Path::avx512:
            return supported(Path::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vbmi");
        case Path::amx:
            return supported(Path::avx512) && __builtin_cpu_supports("avx512bf16") && may_use_tiles();
#endif
#if defined(__aarch64__)
        case Path::neon:
            return true;
#endif
        default:
            return false;
    }
}

Path best() {
    for (Path path : {Path::neon, Path::amx, Path::avx512, Path::avx2}) {
        if (supported(path)) return path;
    }
    return Path::generic;
}

std::atomic<Path>& current() {
    static std::atomic<Path> path{best()};
    return path;
}

}  // namespace

Path current_path() { return current().load(std::memory_order_relaxed); }

bool has_avx512_bf16() {
#if defined(__x86_64__)
    static const bool present = __builtin_cpu_supports("avx512bf16");
    return present && (current_path() == Path::avx512 || has_amx());
#else
    return false;
#endif
}

bool has_amx() { return current_path() == Path::amx; }

}  // namespace entrenar

// Name of the path in use.
ENTRENAR_API const char* entrenar_path() { return entrenar::kNames[static_cast<int>(entrenar::current_path())]; }

// Use `name` (generic, avx2, avx512, amx, neon) from now on; kBadPath if this CPU lacks it.
ENTRENAR_API int entrenar_set_path(const char* name) {
    for (int index = 0; name != nullptr && index < 5; ++index) {
        const auto path = static_cast<entrenar::Path>(index);
        if (std::strcmp(name, entrenar::kNames[index]) != 0 || !entrenar::supported(path)) continue;
        entrenar::current().store(path);
        return entrenar::kOk;
    }
    return entrenar::kBadPath;
}
