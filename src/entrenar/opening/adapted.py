"""Open a model, with or without an adapter, the way the adapter was trained."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.notices import say_once
from entrenar.files.peft import BaseFormat, largest_token, read_base_format
from entrenar.lora.adapter_io import load_adapter
from entrenar.opening.load import load
from entrenar.opening.original import original_weights
from entrenar.opening.source import open_source, with_tokenizer_of


def open_model(
    model: str, adapter: str | None = None, quantize: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and lay an adapter over it.

    Args:
        quantize: number format of the base; None means the one the adapter was trained on (noted in its file), or
            a GGUF's own blocks, or none at all.
    """
    base = read_base_format(Path(adapter)) if adapter else None
    _tell_other_base(model, base, quantize)
    if quantize is not None or base is None:
        loaded, tokenizer = load(model, quantize, dtype=dtype)
    else:
        loaded, tokenizer = load(
            model,
            base.format,
            double_quant=base.double_quant,
            block_size=base.block_size,
            search=base.search,
            dtype=dtype,
        )
    if adapter:
        before = loaded.config.get_text_config().vocab_size
        load_adapter(loaded, adapter, original=original_weights(model))
        largest = largest_token(Path(adapter))
        if largest >= 0 or loaded.config.get_text_config().vocab_size > before:
            tokenizer = with_tokenizer_of(open_source(model, with_tokenizer=False), Path(adapter), largest).tokenizer
    return loaded, tokenizer


def _tell_other_base(model: str, trained_on: BaseFormat | None, quantize: str | None) -> None:
    """Say that the base is asked for in another format than the adapter was trained on, as its file notes."""
    if trained_on is not None and quantize not in (None, trained_on.format):
        say_once(
            f"the adapter was trained over a base held as {trained_on.format}, and {model} is held as {quantize} here, "
            "so the answers are others than in training: leave --quantize (quantize) out to have the same base"
        )
