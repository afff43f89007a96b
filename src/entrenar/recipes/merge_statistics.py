"""What fisher and regmean need beforehand: every model run over a small text, its own or one for all.

The statistics lie in a hidden directory beside the output, a checkpoint for each model. A run that goes on finds them
again; once the merge is complete or refused they are removed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar.core.atomic import atomic_directory
from entrenar.core.errors import InputError
from entrenar.files.safetensors import SafetensorsCheckpoint, write_checkpoint
from entrenar.merging.models import InputModel, split_label
from entrenar.merging.place import discard, disk_full, own_directory, statistics_directory
from entrenar.merging.plan import MergePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW, MAX_ROWS = 512, 64  # tokens of a row, rows at most
_SHARD_BYTES = 5 * 10**9


def measured_texts(plan: MergePlan) -> dict[str, str]:
    """Model → the content of the text it is to be measured on; empty for a method that measures nothing.

    Raises:
        InputError: a model has no text or several, or one cannot be read.
    """
    if plan.method.statistic is None:
        return {}
    named: dict[str, set[str | None]] = {}
    for tensor in plan.tensors:
        for label, text in zip(tensor.labels, tensor.options["text"], strict=True):
            named.setdefault(label, set()).add(text)
    return {label: _content(plan.method.name, label, texts) for label, texts in named.items()}


def _content(method: str, label: str, texts: set[str | None]) -> str:
    from entrenar.recipes.text import read_text  # imports transformers

    path = texts.pop() if len(texts) == 1 else None
    if path is None:
        raise InputError(
            f"{method} measures every model on one small text, and {label} has not one: give its file as `text` in the "
            "model's parameters, or in those of all"
        )
    return read_text(path, f"measure {label} on")


@contextmanager
def measured(plan: MergePlan, output: Path, texts: Mapping[str, str]) -> Iterator[Mapping[str, SafetensorsCheckpoint]]:
    """The statistics of every model of the plan; kept on an error that another run can go on from."""
    directory = statistics_directory(output)
    if not texts:
        yield {}
        return
    with disk_full(output):
        own_directory(directory)
    try:
        with disk_full(output):
            statistics = {label: _measure(plan, plan.models[label], directory, text) for label, text in texts.items()}
        yield statistics
    except InputError:
        discard(directory)
        raise
    discard(directory)


def _measure(plan: MergePlan, model: InputModel, directory: Path, text: str) -> SafetensorsCheckpoint:
    """One model's statistics, from the disk if they are there."""
    key = repr((model.label, model.fingerprint, plan.method.statistic, text))
    stored = directory / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if not stored.is_dir():
        import torch

        from entrenar.evaluation.weight_statistics import input_products, squared_gradients
        from entrenar.models.experts import Experts
        from entrenar.opening.adapted import open_model
        from entrenar.recipes.text import text_rows

        path, adapter = split_label(model.label)
        loaded, tokenizer = open_model(path, adapter, "none")
        if any(isinstance(module, Experts) for module in loaded.modules()):
            raise InputError(f"{model.label} is a mixture of experts, which {plan.method.name} does not measure")
        _fuse(loaded)
        rows = text_rows(tokenizer, text, "the text", f"measure {model.label} on", row=ROW, most=MAX_ROWS)
        make = squared_gradients if plan.method.statistic == "squared gradients" else input_products
        with atomic_directory(stored) as temporary:
            write_checkpoint(temporary, make(loaded, rows), torch.float32, _SHARD_BYTES)
    return SafetensorsCheckpoint(stored)


def _fuse(model: "PreTrainedModel") -> None:
    """Make adapted layers the plain linear layers that they stand for."""
    from torch import nn

    from entrenar.lora.attach import adapted_layers
    from entrenar.lora.fusing import fused_weight

    for name, layer in list(adapted_layers(model)):
        if layer.is_transposed:
            raise InputError(
                f"the adapter changes {name}, which is not a linear layer: export the model with it (--to safetensors) "
                "and merge the result"
            )
        bias = layer.base_bias()
        linear = nn.Linear(layer.d_in, layer.d_out, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(fused_weight(layer).to(model.dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, linear)
