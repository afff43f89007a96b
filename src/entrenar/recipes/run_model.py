"""The model of a run's config: its source, and the base loaded with fresh adapters."""

from typing import cast

import torch
from transformers import PreTrainedModel

from entrenar.lora.attach import attach
from entrenar.lora.token_rows import resize_vocabulary, rows_for
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.load import load_source
from entrenar.opening.original import weights_of
from entrenar.opening.source import ModelSource, open_source
from entrenar.planning.device_memory import used_bytes
from entrenar.planning.fixed import refuse_too_large
from entrenar.recipes.config import RunConfig


def source_of(config: RunConfig) -> ModelSource:
    """The model of a config, its tokenizer with the config's new tokens."""
    source = open_source(config.model.path)
    if config.lora.new_tokens:
        source.tokenizer.add_tokens(config.lora.new_tokens)
    return source


def load_adapted(config: RunConfig, source: ModelSource) -> tuple[PreTrainedModel, int]:
    """The model of a config with fresh adapters, and the bytes that were held where it computes before: libraries.

    Raises:
        InputError: its weights alone exceed what may be held; nothing was loaded.
    """
    section = config.model
    device = resolve_device(section.device)
    dtype = resolve_dtype(section.dtype, device)
    # Building the empty model here also imports the architecture's code, which so counts as libraries.
    refuse_too_large(source, section, config.training, dtype, device)
    libraries = used_bytes(device)
    model = load_source(
        source, section.quantize, section.double_quant, section.block_size, dtype, search=section.search, device=device
    )
    torch.manual_seed(config.training.seed)
    attach(model, config.lora.spec(_new_rows(model, source, config.lora.new_tokens)), weights_of(source))
    return model, libraries


def _new_rows(model: PreTrainedModel, source: ModelSource, new_tokens: list[str]) -> dict[str, list[int]]:
    """Rows for the new tokens, and which they are."""
    if not new_tokens:
        return {}
    tokens = cast(list[int], source.tokenizer.convert_tokens_to_ids(new_tokens))
    resize_vocabulary(model, 1 + max(tokens))
    return rows_for(model, tokens)
