// CPUID once, then a path that a caller may lower (tests run every path on one machine).
#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "errors.h"

namespace entrenar {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "neon"};

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
    for (Path path : {Path::neon, Path::avx512, Path::avx2}) {
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
    return present && current_path() == Path::avx512;
#else
    return false;
#endif
}

}  // namespace entrenar

// Name of the path in use.
ENTRENAR_API const char* entrenar_path() { return entrenar::kNames[static_cast<int>(entrenar::current_path())]; }

// Use `name` (generic, avx2, avx512, neon) from now on; kBadPath if this CPU lacks it.
ENTRENAR_API int entrenar_set_path(const char* name) {
    for (int index = 0; name != nullptr && index < 4; ++index) {
        const auto path = static_cast<entrenar::Path>(index);
        if (std::strcmp(name, entrenar::kNames[index]) != 0 || !entrenar::supported(path)) continue;
        entrenar::current().store(path);
        return entrenar::kOk;
    }
    return entrenar::kBadPath;
}
