// The layout of this library in words, for Python to compare with its own (src/entrenar/native/abi.py).
#include "abi/abi.h"

#include <cstddef>
#include <string>
#include <type_traits>

#include "attention/attention.h"
#include "codebook4/search.h"
#include "common/floats.h"
#include "elementwise/kernels.h"
#include "linear/linear.h"
#include "matmul/matmul.h"
#include "matmul/panel.h"
#include "merge/merge.h"
#include "scales/scales.h"

namespace entrenar {
namespace {

// A type in one word: i an int of 32 bits, n one of 64, f a float, p any pointer, v nothing, else a structure's name.
template <class T>
struct Word {
    static std::string of() {
        if constexpr (std::is_void<T>::value)
            return "v";
        else if constexpr (std::is_pointer<T>::value)
            return "p";
        else if constexpr (std::is_floating_point<T>::value)
            return sizeof(T) == 4 ? "f" : "d";
        else
            return sizeof(T) == 8 ? "n" : "i";
    }
};

template <class T, size_t count>
struct Word<T[count]> {
    static std::string of() { return Word<T>::of() + "*" + std::to_string(count); }
};

template <class Result, class... Arguments>
std::string signature(Result (*)(Arguments...)) {
    std::string words;
    ((words += Word<Arguments>::of()), ...);
    return words + ">" + Word<Result>::of();
}

template <>
struct Word<ScaleBuffers> {
    static std::string of() { return "ScaleBuffers"; }
};
template <>
struct Word<SourceView> {
    static std::string of() { return "SourceView"; }
};
template <>
struct Word<TermView> {
    static std::string of() { return "TermView"; }
};
template <>
struct Word<MemberView> {
    static std::string of() { return "MemberView"; }
};
template <>
struct Word<GroupView> {
    static std::string of() { return "GroupView"; }
};
template <>
struct Word<HeadsView> {
    static std::string of() { return "HeadsView"; }
};
template <>
struct Word<AttentionView> {
    static std::string of() { return "AttentionView"; }
};
template <>
struct Word<BufferView> {
    static std::string of() { return "BufferView"; }
};
template <>
struct Word<NormView> {
    static std::string of() { return "NormView"; }
};
template <>
struct Word<MlpBlockView> {
    static std::string of() { return "MlpBlockView"; }
};
template <>
struct Word<AttentionBlockView> {
    static std::string of() { return "AttentionBlockView"; }
};

#define FIELD(type, name) \
    text += " " #name ":" + Word<decltype(type::name)>::of() + "@" + std::to_string(offsetof(type, name));
#define STRUCT(type) text += "\nstruct " #type " " + std::to_string(sizeof(type));
#define FUNCTION(name) text += "\n" #name " " + signature(&entrenar_##name);
#define CONSTANT(name) text += "\n" #name " " + std::to_string(static_cast<long long>(name));

std::string describe() {
    std::string text;
    STRUCT(ScaleBuffers)
    FIELD(ScaleBuffers, values)
    FIELD(ScaleBuffers, values_bytes)
    FIELD(ScaleBuffers, group)
    FIELD(ScaleBuffers, group_bytes)
    FIELD(ScaleBuffers, offset)
    FIELD(ScaleBuffers, offset_bytes)
    FIELD(ScaleBuffers, map)
    FIELD(ScaleBuffers, map_bytes)
    STRUCT(SourceView)
    FIELD(SourceView, kind)
    FIELD(SourceView, dtype)
    FIELD(SourceView, rows)
    FIELD(SourceView, columns)
    FIELD(SourceView, stride)
    FIELD(SourceView, scale)
    FIELD(SourceView, unused)
    FIELD(SourceView, block_size)
    FIELD(SourceView, data)
    FIELD(SourceView, data_bytes)
    FIELD(SourceView, scales)
    FIELD(SourceView, codebook)
    FIELD(SourceView, codebook_bytes)
    STRUCT(TermView)
    FIELD(TermView, a)
    FIELD(TermView, a_bytes)
    FIELD(TermView, a_stride)
    FIELD(TermView, inner)
    FIELD(TermView, transposed)
    FIELD(TermView, unused)
    FIELD(TermView, source)
    STRUCT(MemberView)
    FIELD(MemberView, weight)
    FIELD(MemberView, a)
    FIELD(MemberView, b)
    FIELD(MemberView, bias)
    FIELD(MemberView, bias_bytes)
    FIELD(MemberView, y)
    FIELD(MemberView, y_bytes)
    FIELD(MemberView, da)
    FIELD(MemberView, da_bytes)
    FIELD(MemberView, db)
    FIELD(MemberView, db_bytes)
    FIELD(MemberView, rank)
    FIELD(MemberView, scale)
    FIELD(MemberView, unused)
    STRUCT(GroupView)
    FIELD(GroupView, x)
    FIELD(GroupView, x_bytes)
    FIELD(GroupView, dx)
    FIELD(GroupView, dx_bytes)
    FIELD(GroupView, residual)
    FIELD(GroupView, residual_bytes)
    FIELD(GroupView, u)
    FIELD(GroupView, u_bytes)
    FIELD(GroupView, tokens)
    FIELD(GroupView, inner)
    FIELD(GroupView, count)
    FIELD(GroupView, members)
    STRUCT(HeadsView)
    FIELD(HeadsView, data)
    FIELD(HeadsView, bytes)
    FIELD(HeadsView, batch)
    FIELD(HeadsView, token)
    FIELD(HeadsView, head)
    STRUCT(AttentionView)
    FIELD(AttentionView, batch)
    FIELD(AttentionView, tokens)
    FIELD(AttentionView, heads)
    FIELD(AttentionView, kv_heads)
    FIELD(AttentionView, width)
    FIELD(AttentionView, starts)
    FIELD(AttentionView, starts_bytes)
    FIELD(AttentionView, scale)
    FIELD(AttentionView, unused)
    FIELD(AttentionView, q)
    FIELD(AttentionView, k)
    FIELD(AttentionView, v)
    STRUCT(BufferView)
    FIELD(BufferView, data)
    FIELD(BufferView, bytes)
    STRUCT(NormView)
    FIELD(NormView, weight)
    FIELD(NormView, bytes)
    FIELD(NormView, dtype)
    FIELD(NormView, eps)
    FIELD(NormView, offset)
    FIELD(NormView, unused)
    STRUCT(MlpBlockView)
    FIELD(MlpBlockView, tokens)
    FIELD(MlpBlockView, hidden)
    FIELD(MlpBlockView, inner)
    FIELD(MlpBlockView, norm)
    FIELD(MlpBlockView, h)
    FIELD(MlpBlockView, x)
    FIELD(MlpBlockView, gate)
    FIELD(MlpBlockView, up)
    FIELD(MlpBlockView, product)
    FIELD(MlpBlockView, u)
    FIELD(MlpBlockView, down_u)
    FIELD(MlpBlockView, out)
    FIELD(MlpBlockView, dh)
    FIELD(MlpBlockView, members)
    FIELD(MlpBlockView, activation)
    FIELD(MlpBlockView, unused)
    STRUCT(AttentionBlockView)
    FIELD(AttentionBlockView, batch)
    FIELD(AttentionBlockView, tokens)
    FIELD(AttentionBlockView, hidden)
    FIELD(AttentionBlockView, heads)
    FIELD(AttentionBlockView, kv_heads)
    FIELD(AttentionBlockView, width)
    FIELD(AttentionBlockView, norm)
    FIELD(AttentionBlockView, q_norm)
    FIELD(AttentionBlockView, k_norm)
    FIELD(AttentionBlockView, h)
    FIELD(AttentionBlockView, x)
    FIELD(AttentionBlockView, q)
    FIELD(AttentionBlockView, k)
    FIELD(AttentionBlockView, v)
    FIELD(AttentionBlockView, o)
    FIELD(AttentionBlockView, lse)
    FIELD(AttentionBlockView, u)
    FIELD(AttentionBlockView, output_u)
    FIELD(AttentionBlockView, out)
    FIELD(AttentionBlockView, dh)
    FIELD(AttentionBlockView, cos)
    FIELD(AttentionBlockView, sin)
    FIELD(AttentionBlockView, rotary_batches)
    FIELD(AttentionBlockView, rotated)
    FIELD(AttentionBlockView, starts)
    FIELD(AttentionBlockView, members)
    FIELD(AttentionBlockView, scale)
    FIELD(AttentionBlockView, rotary_dtype)
    FUNCTION(adapted)
    FUNCTION(adapted_backward)
    FUNCTION(attention_backward)
    FUNCTION(attention)
    FUNCTION(attention_block)
    FUNCTION(attention_block_backward)
    FUNCTION(attention_inputs)
    FUNCTION(mlp_block)
    FUNCTION(mlp_block_backward)
    FUNCTION(dequantize_codebook)
    FUNCTION(dequantize_codebook_panel)
    FUNCTION(quantize_codebook)
    FUNCTION(search_codebook)
    FUNCTION(path)
    FUNCTION(set_path)
    FUNCTION(keep_freed_memory)
    FUNCTION(use_huge_pages)
    FUNCTION(use_gomp)
    FUNCTION(scratch)
    FUNCTION(cross_entropy)
    FUNCTION(function)
    FUNCTION(gated_activation)
    FUNCTION(gated_activation_backward)
    FUNCTION(rms_norm)
    FUNCTION(rms_norm_backward)
    FUNCTION(rms_norm_backward_weight)
    FUNCTION(rotary)
    FUNCTION(dequantize_gguf)
    FUNCTION(quantize_gguf)
    FUNCTION(linear_codebook)
    FUNCTION(linear_codebook_backward)
    FUNCTION(multiply)
    FUNCTION(merge_histogram)
    FUNCTION(merge_between)
    FUNCTION(merge_keep_top)
    FUNCTION(merge_keep_random)
    FUNCTION(merge_keep_by_rank)
    FUNCTION(merge_absolute_sums)
    FUNCTION(merge_non_finite)
    FUNCTION(merge_weighted_sum)
    FUNCTION(merge_task_sum)
    FUNCTION(merge_gram)
    FUNCTION(nest_scales)
    FUNCTION(decode_scales)
    FUNCTION(quantize_symmetric)
    FUNCTION(dequantize_int8)
    FUNCTION(abi)
    CONSTANT(kFloat32)
    CONSTANT(kFloat16)
    CONSTANT(kBfloat16)
    CONSTANT(kOk)
    CONSTANT(kBadSize)
    CONSTANT(kBufferTooSmall)
    CONSTANT(kBadBlockSize)
    CONSTANT(kNullPointer)
    CONSTANT(kBadDtype)
    CONSTANT(kBadPath)
    CONSTANT(kBadArgument)
    CONSTANT(kNoMemory)
    CONSTANT(kSilu)
    CONSTANT(kGelu)
    CONSTANT(kGeluTanh)
    CONSTANT(kExp)
    CONSTANT(kTanh)
    CONSTANT(kNormalCumulative)
    CONSTANT(kScaleGroup)
    CONSTANT(kStrip)
    CONSTANT(kStep)
    CONSTANT(kMaxPlainWidth)
    CONSTANT(kMaxTokens)
    CONSTANT(kMaxPackedTokens)
    CONSTANT(kSumLanes)
    CONSTANT(kUpperBins)
    CONSTANT(kLowerBins)
    CONSTANT(SourceKind::dense)
    CONSTANT(SourceKind::codebook4)
    CONSTANT(SourceKind::gguf)
    CONSTANT(SourceKind::int8)
    return text.substr(1);
}

}  // namespace
}  // namespace entrenar

// A line for every structure, function and constant, in the order of abi.py. The text lives as long as the library.
ENTRENAR_API const char* entrenar_abi() {
    static const std::string text = entrenar::describe();
    return text.c_str();
}
