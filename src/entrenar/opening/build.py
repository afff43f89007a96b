"""A model without its weights: built on `meta`, and which of its parameters a number format may hold."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from entrenar.core.errors import InputError
from entrenar.opening.source import ModelSource


def build_on_meta(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with every tensor on the `meta` device: shapes without memory."""
    if type(source.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{source.path} is a {source.config.model_type}, which transformers has no causal language model for: "
            "models of several kinds of input are not read, nor encoders; take a language model"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    except Exception as error:
        text = source.config.get_text_config()
        pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
            raise InputError(
                f"{source.path}: pad_token_id is {pad}, but the embedding has {rows} rows: set it to one of its tokens"
            ) from None
        reason = f"{error}".strip().split("\n")[0]
        raise InputError(f"{source.path} is not a causal language model that transformers knows: {reason}") from None
    model.generation_config.update(**(source.generation.to_diff_dict() if source.generation else {}))
    model.name_or_path = str(source.path)
    return model


def linear_weights(model: PreTrainedModel, head: nn.Module | None) -> set[str]:
    """Names of the parameters that a number format may hold; not those of `head`."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def embedding_weights(model: PreTrainedModel) -> set[str]:
    """Name of the token embedding's table; none where the embedding does more than look rows up."""
    embedding = model.get_input_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is embedding and _is_plain(module)}


def _is_plain(embedding: nn.Module) -> bool:
    return type(embedding) is nn.Embedding and embedding.max_norm is None
