"""A tiny adapted model and its data for the loop's tests."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from entrenar.data.dataset import PreparedData, prepare
from entrenar.lora.attach import attach_lora
from entrenar.opening.load import load


@pytest.fixture
def tiny_qlora(tiny_model_dir: Path) -> PreTrainedModel:
    """The tiny Llama on an nf4 base with fresh adapters, float32."""
    model, _ = load(str(tiny_model_dir), "nf4", dtype="float32")
    torch.manual_seed(0)
    attach_lora(model, rank=4, alpha=8)
    return model


@pytest.fixture
def tiny_prepared(tiny_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> PreparedData:
    """The tiny rows, a quarter of them held out."""
    return prepare(tiny_tokenizer, tiny_data, validation_fraction=0.25)
