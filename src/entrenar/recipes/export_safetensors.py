"""Export as a Hugging Face directory: open files and adapter, fuse tensor by tensor, measure on text."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.dataset import Dataset, load_dataset
from entrenar.evaluation.perplexity import kl_divergence, perplexity
from entrenar.exporting.fidelity import Fidelity
from entrenar.exporting.safetensors_output import export_streamed
from entrenar.exporting.streaming import StreamedModel
from entrenar.files.peft import BaseFormat, read_adapter
from entrenar.files.prequantized import WRITTEN
from entrenar.models.head import padding_id
from entrenar.opening.adapted import open_model
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED
from entrenar.opening.fed import as_fed, stopping
from entrenar.opening.load import load
from entrenar.opening.source import open_source
from entrenar.recipes.export_request import ExportRequest


def export_safetensors(request: ExportRequest, type: str) -> Fidelity:
    """Write a model, fused with its adapter, as a directory with its fidelity.json.

    Of the request, which is checked:
        base: `dequantized`, the model that was trained (the default of 16 and 32 bits), or `original`, the weights as
            the files have them (the default of 4 bits).
        text: rows to measure loss and KL on, the written model against the live one.
    """
    model, adapter, base = request.model, request.adapter, request.base
    source, format = open_source(model), _base_format(adapter, request.quantize)
    if source.prequantized:
        if base == "original":
            raise InputError(f"{model} holds quantized weights alone, no original ones: leave base out")
        base, format = "dequantized", None
    chosen = base or ("original" if type in WRITTEN or format is None else "dequantized")
    read = read_adapter(Path(adapter)) if adapter else None
    if adapter is not None:
        source = as_fed(source, Path(adapter))
    source = replace(source, generation=stopping(source))
    streamed = StreamedModel(source, read, format if chosen == "dequantized" else None)
    on_text = None
    if request.text is not None:
        dataset = _rows(request.text, source.tokenizer)
        on_text = partial(_measured, dataset, source.tokenizer, lambda: open_model(model, adapter, request.quantize)[0])
    return export_streamed(source, streamed, request.output, type, chosen, lossy=request.lossy, on_text=on_text)


def _base_format(adapter: str | None, quantize: str | None) -> BaseFormat | None:
    """How the base is held under the adapter, as asked, else as the adapter says; None: as its files have it."""
    if quantize is not None:
        format = BaseFormat(format=quantize, block_size=64, double_quant=False)
    else:
        format = read_adapter(Path(adapter)).base_format if adapter else None
    return None if format is None or format.format in (UNQUANTIZED, AS_STORED) else format


def _rows(text: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows to measure on, read before any work."""
    dataset = load_dataset(Path(text), tokenizer, 2048)
    if not len(dataset):
        raise InputError(f"{text} leaves no row to measure on: check its rows")
    return dataset


def _measured(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, open_live: Callable[[], PreTrainedModel], written: Path
) -> dict[str, float]:
    """Loss and perplexity of the live and the written model, and KL(live ‖ written), in nats per token."""
    live, (exported, _) = open_live(), load(str(written))
    pad = padding_id(live, tokenizer.pad_token_id)
    losses = {name: perplexity(model, dataset, 4, pad) for name, model in (("live", live), ("written", exported))}
    figures = {f"{name}_loss": measured.loss for name, measured in losses.items()}
    figures |= {f"{name}_perplexity": measured.perplexity for name, measured in losses.items()}
    return figures | {"kl": kl_divergence(exported, live, dataset, 4, pad), "tokens": losses["live"].tokens}
