"""Small residual blocks with adapters of given ranks, for a CPU or a GPU."""

import torch

from entrenar.layers.residual_blocks import AttentionBlock, MlpBlock, Rotation
from tests.support.blocks import member, norm

HIDDEN, HEADS, KV_HEADS, WIDTH, INNER = 32, 4, 2, 8, 48


def attention_block(ranks: tuple[int, ...], norms: bool) -> AttentionBlock:
    q, k, v, o = ranks
    return AttentionBlock(
        norm(HIDDEN, offset=1.0), member(HEADS * WIDTH, HIDDEN, q, bias=True), member(KV_HEADS * WIDTH, HIDDEN, k),
        member(KV_HEADS * WIDTH, HIDDEN, v), member(HIDDEN, HEADS * WIDTH, o, bias=True), WIDTH, 0.2,
        norm(WIDTH) if norms else None, norm(WIDTH, offset=1.0) if norms else None,
    )  # fmt: skip


def mlp_block(ranks: tuple[int, ...], activation: str) -> MlpBlock:
    gate, up, down, _ = ranks
    return MlpBlock(
        norm(HIDDEN), member(INNER, HIDDEN, gate), member(INNER, HIDDEN, up, bias=True), member(HIDDEN, INNER, down),
        activation,
    )  # fmt: skip


def rotation_of(rotated: int, dtype: torch.dtype) -> Rotation | None:
    angles = torch.rand(2, 5, rotated).to(dtype) * 6  # the halves differ: rotary() assumes nothing of them
    return (angles.cos(), angles.sin()) if rotated else None
