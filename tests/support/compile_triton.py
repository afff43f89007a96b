"""Compile every Triton kernel for a GPU that need not be there: `compile_triton.py 90` is for compute capability 9.0.

Writes a line a kernel.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entrenar.ops.codebook import dequantize_triton as dequantize_codebook_gpu
from entrenar.ops.cross_entropy import triton as cross_entropy_gpu
from entrenar.ops.elementwise import triton as elementwise_gpu

_KINDS = {"bf16": "*bf16", "fp32": "*fp32", "fp16": "*fp16"}
_OTHERS = {
    "labels": "*i64", "losses": "*fp32", "packed": "*u8", "codebook": "*fp32", "group": "*fp32", "offset": "fp32",
    "table": "*fp32", "eps": "fp32", "softcap": "fp32", "cos": "*fp32", "sin": "*fp32",
}  # fmt: skip
_FLOATS = {"x", "out", "grad", "weight", "residual", "gate", "up", "dgate", "dup", "logits"}


def compile_kernel(kernel: Any, kind: str, constants: dict[str, Any], **types: str) -> None:
    """Arguments that are in no table are sizes and strides."""
    known = {**dict.fromkeys(_FLOATS, kind), **_OTHERS, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"enable_fp_fusion": False})
    sys.stdout.write(f"{kernel.__name__} {kind} {constants}: {len(made.asm['cubin'])} bytes\n")


for kind in _KINDS.values():
    for height, width in ((1, 2048), (16, 64), (1, 32768)):
        shape = {"height": height, "width": width}
        compile_kernel(elementwise_gpu._rms_norm_kernel, kind, shape)
        for adds in (False, True):
            compile_kernel(elementwise_gpu._rms_norm_backward_kernel, kind, {"adds": adds, **shape})
    for tanh in (False, True):
        compile_kernel(elementwise_gpu._gated_kernel, kind, {"tanh": tanh, "size": 1024})
        compile_kernel(elementwise_gpu._gated_backward_kernel, kind, {"tanh": tanh, "size": 1024})
    for transpose in (False, True):
        for half, rest in ((32, 0), (16, 64), (1, 8)):
            constants = {"transpose": transpose, "many": 16, "half": half, "rest": rest}
            compile_kernel(elementwise_gpu._rotary_kernel, kind, constants)
    for caps in (False, True):
        for gradient in (False, True):
            constants = {"vocabulary": 32000, "caps": caps, "gradient": gradient, "size": 4096}
            compile_kernel(cross_entropy_gpu._kernel, kind, constants)
    for parts, scales in ((1, "*fp32"), (2, "*u8"), (4, "*u8")):
        constants = {"parts": parts, "block_size": 64, "group_size": 256, "size": 1024}
        compile_kernel(dequantize_codebook_gpu._kernel, kind, constants, scales=scales, offset="*fp32")
