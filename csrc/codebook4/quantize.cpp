// Entry point of codebook quantization, and its partial last block, which divides where whole blocks multiply.
#include "codebook4/quantize.h"

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

constexpr int64_t kGrainElements = 1 << 14;

const Paths<QuantizeCodebook> kPaths = {&quantize_codebook_generic, ENTRENAR_ON_X86(&quantize_codebook_avx2),
                                        ENTRENAR_ON_X86(&quantize_codebook_avx512), nullptr};

uint8_t nearest_code(const Nearest& nearest, float value) {
    int below = 0;
    while (below < 15 && !(nearest.midpoints[below] >= value)) ++below;
    return nearest.order[below];
}

// The buckets' tables, if no bucket holds two midpoints (fp4's lie too close around 0).
void prepare_buckets(Nearest* nearest) {
    nearest->bucketed = true;
    int below = 0;
    for (int bucket = 0; bucket < 32; ++bucket) {
        const auto here = [&] {
            return below < 15 &&
                   static_cast<int>(nearest->midpoints[below] * kBucketsPerUnit + kBucketCentre) == bucket;
        };
        nearest->codes[2 * bucket] = nearest->codes[2 * bucket + 1] = nearest->order[below];
        nearest->threshold[bucket] = 2.0f;  // above every x
        if (!here()) continue;
        nearest->threshold[bucket] = nearest->midpoints[below];
        nearest->codes[2 * bucket + 1] = nearest->order[++below];
        if (here()) nearest->bucketed = false;
    }
    if (below != 15) nearest->bucketed = false;
}

Nearest prepare(const float* codebook) {
    Nearest nearest = {};
    for (int i = 0; i < 16; ++i) nearest.order[i] = static_cast<uint8_t>(i);
    std::stable_sort(nearest.order, nearest.order + 16, [&](int a, int b) { return codebook[a] < codebook[b]; });
    for (int i = 0; i < 15; ++i) {
        nearest.midpoints[i] = (codebook[nearest.order[i]] + codebook[nearest.order[i + 1]]) / 2;
    }
    nearest.zero = nearest_code(nearest, 0.0f);
    prepare_buckets(&nearest);
    return nearest;
}

// The last `count` elements, fewer than a block, starting at element `begin`.
void quantize_partial(const void* in, int dtype, const Nearest& nearest, int64_t begin, int64_t count, uint8_t* codes,
                      void* absmax) {
    uint32_t largest = float_bits(kTiny);
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, float_bits(load_element(in, dtype, begin + i)) & 0x7FFFFFFFu);
    }
    const float scale = bits_float(largest);
    store_element(absmax, kFloat32, 0, scale);
    const auto code = [&](int64_t i) { return nearest_code(nearest, load_element(in, dtype, begin + i) / scale); };
    for (int64_t i = 0; i < count; i += 2) {
        const uint8_t odd = i + 1 < count ? code(i + 1) : nearest.zero;
        codes[i / 2] = static_cast<uint8_t>(code(i) << 4 | odd);
    }
}

}  // namespace
}  // namespace entrenar

// in: count floats of `dtype`; codebook: 16 float32 in [-1, 1], any order; codes: ceil(count / 2) bytes;
// absmax: one float32 per block. block_size is a multiple of 16.
ENTRENAR_API int entrenar_quantize_codebook(const void* in, int64_t in_bytes, const void* codebook,
                                            int64_t codebook_bytes, void* codes, int64_t codes_bytes, void* absmax,
                                            int64_t absmax_bytes, int64_t count, int64_t block_size, int dtype,
                                            int threads) {
    using namespace entrenar;
    if (!is_dtype(dtype)) return kBadDtype;
    if (count < 0) return kBadSize;
    if (block_size < 16 || block_size % 16 != 0) return kBadBlockSize;
    if (const int error = check_buffer(in, in_bytes, count, dtype_bytes(dtype))) return error;
    if (const int error = check_buffer(codebook, codebook_bytes, 16, 4)) return error;
    if (const int error = check_buffer(codes, codes_bytes, divide_up(count, 2), 1)) return error;
    if (const int error = check_buffer(absmax, absmax_bytes, divide_up(count, block_size), 4)) return error;
    float table[16];
    std::memcpy(table, codebook, sizeof table);
    const Nearest nearest = prepare(table);
    const QuantizeCodebook& kernel = pick(kPaths);
    auto* bytes = static_cast<uint8_t*>(codes);
    const int64_t whole = count / block_size;
    const int64_t grain = std::max<int64_t>(kGrainElements / block_size, 1);
    parallel_for(whole, grain, threads, [&](int64_t begin, int64_t end) {
        const char* from = static_cast<const char*>(in) + begin * block_size * dtype_bytes(dtype);
        kernel.blocks(from, dtype, nearest, block_size, end - begin, bytes + begin * block_size / 2,
                      static_cast<char*>(absmax) + begin * 4);
    });
    const int64_t rest = count - whole * block_size;
    if (rest > 0) {
        quantize_partial(in, dtype, nearest, whole * block_size, rest, bytes + whole * block_size / 2,
                         static_cast<char*>(absmax) + whole * 4);
    }
    return kOk;
}
