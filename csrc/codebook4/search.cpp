// Entry point of the search for scales.
#include "codebook4/search.h"

#include <algorithm>
#include <cstring>
#include "abi/abi.h"

#include "common/dispatch.h"
#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

constexpr int64_t kGrainElements = 1 << 12;

const Paths<SearchCodebook> kPaths = {&search_codebook_generic, ENTRENAR_ON_X86(&search_codebook_avx2),
                                      ENTRENAR_ON_X86(&search_codebook_avx512), nullptr};

SearchTable prepare(const float* codebook) {
    SearchTable table = {};
    for (int i = 0; i < 16; ++i) table.order[i] = static_cast<uint8_t>(i);
    std::stable_sort(table.order, table.order + 16, [&](int a, int b) { return codebook[a] < codebook[b]; });
    for (int i = 0; i < 16; ++i) table.values[i] = codebook[table.order[i]];
    for (int i = 0; i < 15; ++i) table.midpoints[i] = (table.values[i] + table.values[i + 1]) / 2;
    return table;
}

}  // namespace
}  // namespace entrenar

// in: count floats of `dtype`; codebook: 16 float32 in [-1, 1], any order; codes: count / 2 bytes; scales: one float32
// per block. block_size is a multiple of 16, count one of block_size: a partial block is padded by the caller.
ENTRENAR_API int entrenar_search_codebook(const void* in, int64_t in_bytes, const void* codebook,
                                          int64_t codebook_bytes, void* codes, int64_t codes_bytes, void* scales,
                                          int64_t scales_bytes, int64_t count, int64_t block_size, int dtype,
                                          int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (block_size < 16 || block_size % 16 != 0) return kBadBlockSize;
    if (count < 0 || count % block_size != 0) return kBadSize;
    if (const int error = check_buffer(in, in_bytes, count, dtype_bytes(dtype))) return error;
    if (const int error = check_buffer(codebook, codebook_bytes, 16, 4)) return error;
    if (const int error = check_buffer(codes, codes_bytes, count / 2, 1)) return error;
    if (const int error = check_buffer(scales, scales_bytes, count / block_size, 4)) return error;
    float entries[16];
    std::memcpy(entries, codebook, sizeof entries);
    const SearchTable table = prepare(entries);
    const SearchCodebook& kernel = pick(kPaths);
    auto* bytes = static_cast<uint8_t*>(codes);
    parallel_for(count / block_size, std::max<int64_t>(kGrainElements / block_size, 1), threads,
                 [&](int64_t begin, int64_t end) {
                     const char* from = static_cast<const char*>(in) + begin * block_size * dtype_bytes(dtype);
                     kernel.blocks(from, dtype, table, block_size, end - begin, bytes + begin * block_size / 2,
                                   static_cast<char*>(scales) + begin * 4);
                 });
    return kOk;
}
