"""Documents that share a row: which architectures keep them apart is found by trying."""

from pathlib import Path

import pytest
import torch

from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.isolation import isolates_documents
from entrenar.opening.load import load
from tests.support.families import FAMILIES, MIXING, make_family

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_that_keep_documents_apart_are_recognised(family: str, dtype: torch.dtype) -> None:
    model = make_family(family, dtype)
    assert isolates_documents(model)
    use_fast_forwards(model)
    assert isolates_documents(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MIXING)
def test_architectures_that_mix_them_are_too(name: str, dtype: torch.dtype) -> None:
    assert not isolates_documents(make_family(name, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_sdpa_keeps_them_apart_too(family: str) -> None:
    assert isolates_documents(make_family(family, attn_implementation="eager"))


def test_the_real_model_keeps_them_apart_in_four_bits(smollm2: Path) -> None:
    model, _ = load(str(smollm2), "nf4")
    assert isolates_documents(model)


def test_trying_leaves_the_global_generator_alone() -> None:
    model = make_family("llama")
    before = torch.get_rng_state()
    isolates_documents(model)
    assert torch.equal(torch.get_rng_state(), before)
