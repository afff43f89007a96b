"""Open a model, with or without an adapter, the way the adapter was trained."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.notices import say_once
from entrenar.files.peft import BaseFormat, read_base_format
from entrenar.lora.adapter_io import load_adapter
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.fed import as_fed
from entrenar.opening.load import load_source
from entrenar.opening.original import original_weights
from entrenar.opening.source import open_source


def open_model(
    model: str, adapter: str | None = None, quantize: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and lay an adapter over it.

    Args:
        quantize: number format of the base; None means the one the adapter was trained on (noted in its file), or
            a GGUF's own blocks, or none at all.

    Raises:
        InputError: see `load`, `load_adapter` and `as_fed`.
    """
    noted = read_base_format(Path(adapter)) if adapter else None
    _tell_other_base(model, noted, quantize)
    source = open_source(model)
    if adapter:
        source = as_fed(source, Path(adapter))
    if quantize is not None or noted is None:
        format = quantize or (AS_STORED if source.gguf else UNQUANTIZED)
        noted = BaseFormat(format=format, block_size=64, double_quant=False)
    where = resolve_device("auto")
    loaded = load_source(
        source, noted.format, noted.double_quant, noted.block_size, resolve_dtype(dtype, where), search=noted.search,
        device=where,
    )  # fmt: skip
    if adapter:
        load_adapter(loaded, adapter, original=original_weights(model))
    return loaded, source.tokenizer


def _tell_other_base(model: str, trained_on: BaseFormat | None, quantize: str | None) -> None:
    """Say that the base is asked for in another format than the adapter was trained on, as its file notes."""
    if trained_on is not None and quantize not in (None, trained_on.format):
        say_once(
            f"the adapter was trained over a base held as {trained_on.format}, and {model} is held as {quantize} here, "
            "so the answers are others than in training: leave --quantize (quantize) out to have the same base"
        )
