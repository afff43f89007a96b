"""Write a fused base as a Hugging Face directory, tensor by tensor from its files, with a report of what survived."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.atomic import atomic_directory
from entrenar.core.errors import InputError
from entrenar.exporting.fidelity import REPORT_NAME, Fidelity, ModuleFidelity, measure, weighted_survival
from entrenar.exporting.streaming import StreamedModel
from entrenar.files.bitsandbytes import Layout, four_bit_tensors, quantization_config
from entrenar.files.lazy_tensor import LazyTensor, as_float
from entrenar.files.safetensors import write_checkpoint
from entrenar.opening.source import ModelSource
from entrenar.quant.tensor import QuantizedTensor, quantize

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
# Scales are searched for and doubly quantized: 4.127 bits a weight, and the least error that bitsandbytes' layout has.
FOUR_BIT = {"nf4": Layout("nf4", 64, double_quant=True, dtype=torch.bfloat16)}
_TRIED_LAYERS = 3
_ENOUGH = 0.75  # of a trained change; the original base, which is written without being asked, keeps 0.87 to 0.92


@dataclass
class _Writer:
    """What is to be written, and what has been measured on the way."""

    model: StreamedModel
    type: str
    measured: list[ModuleFidelity] = field(default_factory=list)

    def tensors(self) -> list[LazyTensor]:
        """Every tensor of the output, in the order of the files."""
        return [tensor for name in self.model.names() for tensor in self._tensors_of(name)]

    def _tensors_of(self, name: str) -> list[LazyTensor]:
        shape, buffer = self.model.shape(name), self.model.base.buffer(name)
        if buffer is not None:
            return [LazyTensor(name, shape, buffer.read, dtype=buffer.dtype)]
        if self.type in FOUR_BIT and name in self.model.base.linear:
            layout = FOUR_BIT[self.type]
            return four_bit_tensors(name, (shape[0], shape[1]), layout, lambda: self.four_bit(name))
        return [LazyTensor(name, shape, lambda: self._float(name))]

    def four_bit(self, name: str) -> QuantizedTensor:
        """A weight, fused and quantized."""
        fused, layout = self.model.fused(name), FOUR_BIT[self.type]
        quantized = quantize(
            fused.weight.to(torch.bfloat16) if fused.before is None else fused.weight,
            format=layout.format, block_size=layout.block_size, double_quant=layout.double_quant, search=True,
            name=name,
        )  # fmt: skip
        self.measured.append(measure(name, fused, quantized.dequantize()))
        return quantized

    def _float(self, name: str) -> Tensor:
        fused = self.model.fused(name)
        dtype = FLOATS.get(self.type, torch.bfloat16)
        written = as_float(name, fused.weight, dtype)
        if fused.before is not None:
            self.measured.append(measure(name, fused, written))
        return written


def export_streamed(
    source: ModelSource,
    model: StreamedModel,
    directory: Path,
    type: str,
    base: str,
    *,
    lossy: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_text: Callable[[Path], dict[str, float]] | None = None,
) -> Fidelity:
    """Write `directory`, which must not exist.

    Args:
        type: one of TYPES. base: `dequantized` or `original`, for the report. lossy: write a 4-bit type although the
            change would be lost in it. on_text: measures what was written, before it gets its name.

    Raises:
        InputError: a 4-bit type in which most of the change would be lost, unless `lossy`: the share that would
            survive is named. A number that the type does not hold.
    """
    if type in FOUR_BIT and model.base.experts:
        raise InputError(
            f"{type} of a mixture of experts is not written: transformers fuses the experts, for which bitsandbytes' "
            "layout has no place; choose bf16, f16 or f32"
        )
    writer = _Writer(model, type)
    if type in FOUR_BIT and base == "dequantized" and not lossy:
        _refuse_loss(writer)
    with atomic_directory(directory) as temporary:
        dtype = FLOATS.get(type, torch.bfloat16)
        write_checkpoint(temporary, writer.tensors(), dtype, max_shard_bytes, source.provenance)
        _write_config(temporary, source, model, type)
        report = Fidelity(base, type, writer.measured, on_text(temporary) if on_text else None)
        (temporary / REPORT_NAME).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return report


def _refuse_loss(writer: _Writer) -> None:
    names = [
        name for name in writer.model.names() if writer.model.is_adapted(name) and name in writer.model.base.linear
    ]
    for name in names[:_TRIED_LAYERS]:
        writer.four_bit(name)
    share = weighted_survival(writer.measured)
    writer.measured.clear()
    if share is not None and share < _ENOUGH:
        raise InputError(
            f"{writer.type} of a dequantized base would keep about {share:.1%} of what was trained (refused below "
            f"{_ENOUGH:.0%}), because its values snap back to where they were: use base original, or ask for lossy "
            "(--lossy)"
        )


def _write_config(directory: Path, source: ModelSource, model: StreamedModel, type: str) -> None:
    config = copy.deepcopy(source.config)
    config.dtype = FLOATS.get(type, torch.bfloat16)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    if type in FOUR_BIT:
        head = model.base.meta.get_output_embeddings()
        skipped = [name for name, module in model.base.meta.named_modules() if module is head]
        config.quantization_config = quantization_config(FOUR_BIT[type], skipped)
    config.get_text_config().vocab_size = model.vocabulary
    if model.is_untied:
        config.get_text_config().tie_word_embeddings = False
    config.architectures = [model.base.meta.__class__.__name__]
    config.save_pretrained(directory)
    if source.generation is not None:
        source.generation.save_pretrained(directory)
    source.tokenizer.save_pretrained(directory)
