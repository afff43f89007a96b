"""Fusing: the one place where what is trained is added to the weight that it was trained over.

A live module is fused whole (`fused_weight`), and so is a layer that was made over one weight of a file (`fuse`); an
expert's matrix gets its share of the factors (`fuse_expert`); a merge reads a weight in ranges and adds the same range
of the change (`delta_range`). How a variant of LoRA computes its weight is known to its layer alone
(`AdapterLayer.merge_to_f32`).
"""

from dataclasses import dataclass

from torch import Tensor

from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.experts import expert_factors
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.token_rows import TokenRows

FusedModule = AdapterLayer | TokenRows | QuantizedLinear | QuantizedEmbedding


@dataclass(frozen=True)
class Fused:
    """A weight as the model that was trained has it, and before the adapter, float32; `before` None: not adapted."""

    weight: Tensor
    before: Tensor | None


def fused_weight(module: FusedModule) -> Tensor:
    """The weight that a module computes with, shaped as the module that it stands for has it.

    Returns:
        float32, (d_out, d_in), or (d_in, d_out) of an embedding and of GPT-2's Conv1D; of token rows in their base's
        dtype.
    """
    if isinstance(module, AdapterLayer):
        return _as_module(module, module.merge_to_f32())
    return module.fused_weight() if isinstance(module, TokenRows) else module.dequantized()


def fuse(layer: AdapterLayer, stored: Tensor) -> Fused:
    """A layer's weight with and without its adapter, in the shape of its module.

    Args:
        stored: the weight as its file has it. Where an initialisation took a part out of the base it is what the
            adapter is measured against; elsewhere that is the layer's base, which may be quantized.
    """
    before = stored.float() if layer.taken is not None else _as_module(layer, layer.base_to_f32())
    return Fused(fused_weight(layer), before)


def fuse_expert(before: Tensor, a: Tensor, b: Tensor, scale: float, *, count: int, index: int, part: int) -> Fused:
    """One expert's matrix (d_out, d_in) float32 with its share of the adapter of all.

    Args:
        a, b: the factors of all `count` experts, as lora/experts.py lays them out. index: of the expert.
        part: which of the matrices that B's rows stand for one below another: gate 0, up 1; down 0.
    """
    every_a, every_b = expert_factors(a.float(), b.float(), count)
    rows = every_b[index].split(before.shape[0])[part]
    return Fused(before + scale * (rows @ every_a[index]), before)


def delta_range(a: Tensor, b: Tensor, start: int, count: int) -> Tensor:
    """Elements `start` to `start + count` of the change B·A, row by row, (count,) float32.

    Args:
        a: (rank, d_in) float32. b: (d_out, rank) float32, times the scale.
    """
    columns = a.shape[1]
    first, end = start // columns, -(-(start + count) // columns)
    return (b[first:end] @ a).view(-1)[start - first * columns :][:count]


def _as_module(layer: AdapterLayer, weight: Tensor) -> Tensor:
    return weight.t() if layer.is_transposed else weight
