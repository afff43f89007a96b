// Which instruction set serves. Every kernel group has one table of function pointers per path:
//
//   csrc/<group>/<name>_generic.cpp   portable C++, always there
//   csrc/<group>/<name>_avx2.cpp      -mavx2 -mfma -mf16c
//   csrc/<group>/<name>_avx512.cpp    + F, BW, DQ, VL, VBMI (Ice Lake, Zen 4 and later)
//   csrc/<group>/<name>_avx512bf16.cpp  + BF16: not a path of its own, a part of avx512 where the CPU has it
//   csrc/<group>/<name>_amx.cpp       + AMX tiles of bfloat16 (Sapphire Rapids and later); avx512 serves for the rest
//   csrc/<group>/<name>_neon.cpp      aarch64
//   csrc/<group>/<name>.cpp           the exported functions: check sizes, pick a table, split the work over threads
//
// Every group has a generic table, so whatever the library does it does on every path; a table that a path lacks is the
// next simpler one's. avx512 without BF16 takes its bfloat16 products and attention from avx2, neon most from generic.
// Groups without kernels of their own (adapted, block) are made of others. Where the files of several paths would be
// alike they are a few lines each around one header over float vectors (common/lanes.h).
//
// Kernel files (with a suffix) define `extern const Table <name>_<path>` and keep everything else in an anonymous
// namespace; they use no inline function or template with external linkage (see common/floats.h for the reason).
#pragma once

#if defined(__x86_64__)
#define ENTRENAR_ON_X86(pointer) (pointer)
#else
#define ENTRENAR_ON_X86(pointer) nullptr
#endif
#if defined(__aarch64__)
#define ENTRENAR_ON_ARM(pointer) (pointer)
#else
#define ENTRENAR_ON_ARM(pointer) nullptr
#endif

namespace entrenar {

enum class Path : int { generic, avx2, avx512, amx, neon };

// The path in use: the best one this CPU has, or what entrenar_set_path chose.
Path current_path();

// Whether the CPU has AVX512-BF16 and the path in use is avx512 or amx.
bool has_avx512_bf16();

// Whether the path in use is amx.
bool has_amx();

// One table per path, BF16's and AMX's aside; a null entry falls back to the next simpler one, in the end to `generic`.
template <class Table>
struct Paths {
    const Table* generic;
    const Table* avx2;
    const Table* avx512;
    const Table* neon;
};

template <class Table>
const Table& pick(const Paths<Table>& paths) {
    const Path path = current_path();
    if (path == Path::neon && paths.neon) return *paths.neon;
    const bool avx512 = path == Path::avx512 || path == Path::amx;
    if (avx512 && paths.avx512) return *paths.avx512;
    if ((avx512 || path == Path::avx2) && paths.avx2) return *paths.avx2;
    return *paths.generic;
}

}  // namespace entrenar
