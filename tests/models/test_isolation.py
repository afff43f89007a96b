"""Documents that share a row: which architectures keep them apart is found by trying."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.models.isolation import isolates_documents
from entrenar.models.load import load


def as_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    nn.Module.to(changed, dtype)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_that_keep_documents_apart_are_recognised(
    isolating_model: PreTrainedModel, dtype: torch.dtype
) -> None:
    assert isolates_documents(as_dtype(isolating_model, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_that_mix_them_are_too(mixing_model: PreTrainedModel, dtype: torch.dtype) -> None:
    assert not isolates_documents(as_dtype(mixing_model, dtype))


def test_attention_without_sdpa_keeps_them_apart_too(isolating_model: PreTrainedModel) -> None:
    model = copy.deepcopy(isolating_model)
    model.set_attn_implementation("eager")
    assert isolates_documents(model)


def test_the_real_model_keeps_them_apart_in_four_bits(smollm2: Path) -> None:
    model, _ = load(str(smollm2), "nf4")
    assert isolates_documents(model)


def test_trying_leaves_the_global_generator_alone(isolating_model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    isolates_documents(isolating_model)
    assert torch.equal(torch.get_rng_state(), before)
