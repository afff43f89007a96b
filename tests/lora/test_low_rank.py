"""The factors that both adapter layers share."""

import math

import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.qlora_layer import QLoRALayer

KINDS = pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
Kind = type[LoRALayer] | type[QLoRALayer]


@KINDS
def test_a_is_kaiming_uniform_and_b_zero_both_float32(kind: Kind) -> None:
    """With a = √5 the bound is 1/√d_in, as in peft; a uniform variable's deviation is its bound / √3."""
    layer = kind(torch.ones(300, 400, dtype=torch.bfloat16), rank=200)
    limit = 1 / math.sqrt(400)
    a = layer.lora_a.detach()
    assert a.abs().max() <= limit
    assert a.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert abs(a.mean().item()) < 0.02 * limit
    assert not layer.lora_b.any()
    assert (a.dtype, layer.lora_b.dtype) == (torch.float32, torch.float32)
    assert (a.shape, layer.lora_b.shape) == ((200, 400), (300, 200))


@KINDS
def test_the_scale_is_alpha_over_rank(kind: Kind) -> None:
    layer = kind(torch.ones(8, 6), rank=4, alpha=10)
    assert (layer.scale, layer.alpha, layer.rank, layer.d_in, layer.d_out) == (2.5, 10.0, 4, 6, 8)


@KINDS
def test_the_factors_are_what_is_trained(kind: Kind) -> None:
    layer = kind(torch.ones(8, 6), rank=2, bias=torch.ones(8))
    assert [id(p) for p in layer.trainable_params()] == [id(layer.lora_a), id(layer.lora_b)]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


@KINDS
@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_names_itself(kind: Kind, rank: int) -> None:
    with pytest.raises(InputError, match=rf"rank {rank} .*1 or more"):
        kind(torch.ones(8, 6), rank=rank)


@KINDS
def test_any_rank_from_one_fits_also_one_above_the_smaller_side(kind: Kind) -> None:
    assert [kind(torch.ones(8, 6), rank=rank).rank for rank in (1, 6, 7)] == [1, 6, 7]


@KINDS
@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4)])
def test_a_base_that_is_not_two_dimensional_names_both_counts(kind: Kind, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"2 dimensions .*has {len(shape)}\b"):
        kind(torch.ones(shape), rank=1)


@KINDS
@pytest.mark.parametrize("width", [1, 5, 7])
def test_a_wrong_last_dimension_names_both_numbers(kind: Kind, width: int) -> None:
    with pytest.raises(InputError, match=rf"last dimension is {width} .*takes 6"):
        kind(torch.ones(8, 6), rank=1)(torch.ones(2, width))


@KINDS
def test_an_input_without_dimensions_names_both_numbers(kind: Kind) -> None:
    with pytest.raises(InputError, match=r"0 dimensions .*6"):
        kind(torch.ones(8, 6), rank=1)(torch.tensor(1.0))


@KINDS
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 5.0, math.nan])
def test_a_dropout_outside_its_range_is_an_error_that_shows_it(kind: Kind, dropout: float) -> None:
    with pytest.raises(InputError, match=f"dropout {dropout}"):
        kind(torch.ones(8, 6), rank=1, dropout=dropout)
