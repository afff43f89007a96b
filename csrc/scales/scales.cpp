// Double quantization of block scales, both ways. The arithmetic is quant/scales.py's, operation by operation.
#include "scales/scales.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include "abi/abi.h"

#include "common/errors.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/sizes.h"

namespace entrenar {
namespace {

float float_at(const void* buffer, int64_t index) { return load_element(buffer, kFloat32, index); }

// The largest magnitude of values - offset; compared as integers, so that a NaN wins as it does in torch.
float group_absmax(const void* values, float offset, int64_t begin, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
        largest = std::max(largest, float_bits(float_at(values, i) - offset) & 0x7FFFFFFFu);
    }
    return bits_float(largest);
}

// bitsandbytes first rounds to a grid of 65,536 steps; this maps each step to the nearest entry of the map.
int dynamic_code(float scaled, const float* midpoints) {
    if (scaled != scaled) return 0;  // 0 times the reciprocal of a denormal
    const float clamped = std::min(std::max(scaled, -1.0f), 1.0f);
    const auto step = static_cast<int32_t>(static_cast<float>(static_cast<double>(clamped + 1) * 0.5 * 65535 + 0.5));
    const float grid = -1.0f + (2.0f * static_cast<float>(step)) / 65535;
    return static_cast<int>(std::lower_bound(midpoints, midpoints + 255, grid) - midpoints);
}

void nest_dynamic(const void* values, int64_t begin, int64_t end, float offset, const float* midpoints, uint8_t* codes,
                  void* group) {
    const float absmax = group_absmax(values, offset, begin, end);
    store_element(group, kFloat32, begin / kScaleGroup, absmax);
    const bool usable = absmax > 0 && absmax <= 3.4028234663852886e38f;  // else the caller reports it by absmax
    const float reciprocal = 1.0f / absmax;
    for (int64_t i = begin; i < end; ++i) {
        codes[i] =
            usable ? static_cast<uint8_t>(dynamic_code((float_at(values, i) - offset) * reciprocal, midpoints)) : 0;
    }
}

void nest_linear(const void* values, int64_t begin, int64_t end, uint8_t* codes, void* group) {
    const float maximum = group_absmax(values, 0.0f, begin, end);
    store_element(group, kFloat32, begin / kScaleGroup, maximum);
    const bool usable = maximum > 0 && maximum <= 3.4028234663852886e38f;
    for (int64_t i = begin; i < end; ++i) {
        codes[i] = usable ? static_cast<uint8_t>(std::nearbyint(float_at(values, i) / maximum * 255)) : 0;
    }
}

}  // namespace

int check_scales(const ScaleBuffers& scales, int64_t blocks) {
    if (blocks < 0) return kBadSize;
    if (scales.group == nullptr) return check_buffer(scales.values, scales.values_bytes, blocks, 4);
    if (const int error = check_buffer(scales.values, scales.values_bytes, blocks, 1)) return error;
    if (const int error = check_buffer(scales.group, scales.group_bytes, divide_up(blocks, kScaleGroup), 4))
        return error;
    if (scales.map == nullptr) return kOk;
    if (const int error = check_buffer(scales.map, scales.map_bytes, 256, 4)) return error;
    return check_buffer(scales.offset, scales.offset_bytes, 1, 4);
}

void decode_scales(const ScaleBuffers& scales, int64_t first, int64_t count, float* out) {
    if (scales.group == nullptr) {
        std::memcpy(out, static_cast<const char*>(scales.values) + first * 4, static_cast<size_t>(count) * 4);
        return;
    }
    const auto* codes = static_cast<const uint8_t*>(scales.values) + first;
    const float offset = scales.map ? float_at(scales.offset, 0) : 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float group = float_at(scales.group, (first + i) / kScaleGroup);
        out[i] =
            scales.map ? float_at(scales.map, codes[i]) * group + offset : static_cast<float>(codes[i]) / 255 * group;
    }
}

}  // namespace entrenar

// Hold float32 scales in 8 bits. map (256 float32, ascending) and offset for `dynamic`; both null for `linear`.
ENTRENAR_API int entrenar_nest_scales(const void* scales, int64_t scales_bytes, const void* offset,
                                      int64_t offset_bytes, const void* map, int64_t map_bytes, void* codes,
                                      int64_t codes_bytes, void* group, int64_t group_bytes, int64_t count,
                                      int threads) {
    using namespace entrenar;
    if (const int error = check_buffer(scales, scales_bytes, count, 4)) return error;
    if (const int error = check_buffer(codes, codes_bytes, count, 1)) return error;
    const int64_t groups = divide_up(count, kScaleGroup);
    if (const int error = check_buffer(group, group_bytes, groups, 4)) return error;
    float midpoints[255] = {};
    float centre = 0;
    if (map != nullptr) {
        if (const int error = check_buffer(map, map_bytes, 256, 4)) return error;
        if (const int error = check_buffer(offset, offset_bytes, 1, 4)) return error;
        for (int i = 0; i < 255; ++i) midpoints[i] = 0.5f * (float_at(map, i) + float_at(map, i + 1));
        centre = float_at(offset, 0);
    }
    auto* out = static_cast<uint8_t*>(codes);
    parallel_for(groups, 16, threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            const int64_t from = g * kScaleGroup, to = std::min(from + kScaleGroup, count);
            if (map != nullptr) nest_dynamic(scales, from, to, centre, midpoints, out, group);
            if (map == nullptr) nest_linear(scales, from, to, out, group);
        }
    });
    return kOk;
}

// The float32 scale of every block, from whichever way they are stored.
ENTRENAR_API int entrenar_decode_scales(const void* scales, int64_t scales_bytes, const void* group,
                                        int64_t group_bytes, const void* offset, int64_t offset_bytes, const void* map,
                                        int64_t map_bytes, void* out, int64_t out_bytes, int64_t count, int threads) {
    using namespace entrenar;
    const ScaleBuffers block_scales{scales, scales_bytes, group, group_bytes, offset, offset_bytes, map, map_bytes};
    if (const int error = check_scales(block_scales, count)) return error;
    if (const int error = check_buffer(out, out_bytes, count, 4)) return error;
    parallel_for(count, 4096, threads, [&](int64_t begin, int64_t end) {
        float tile[kScaleGroup];
        for (int64_t i = begin; i < end; i += kScaleGroup) {
            const int64_t n = std::min(kScaleGroup, end - i);
            decode_scales(block_scales, i, n, tile);
            std::memcpy(static_cast<char*>(out) + i * 4, tile, static_cast<size_t>(n) * 4);
        }
    });
    return kOk;
}
