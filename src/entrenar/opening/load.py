"""Load a causal language model: config → model on `meta` → each tensor read, quantized, put into its place.

There are never two copies of the base, and never more of it in 16 or 32 bits than a few pieces of a tensor, which
several threads read and quantize (files/stream.py). What stays as the files have it is not even decoded (as_stored.py).
"""

from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.files.stream import stream
from entrenar.models.acceleration.confirmed import make_fast
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED, weights_as_stored
from entrenar.opening.build import build_on_meta, linear_weights
from entrenar.opening.complete import compute_buffers, tie_weights
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.match import match_tensors
from entrenar.opening.place import Places
from entrenar.opening.source import ModelSource, open_source
from entrenar.quant.registry import check_block_size, get_format
from entrenar.quant.tensor import PieceQuantizer, QuantizedTensor, as_stored_tensor

_CPU = torch.device("cpu")


def load(
    path: str | Path,
    quantize: str | None = None,
    *,
    double_quant: bool = False,
    block_size: int = 64,
    search: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, the linear layers (not the output head) quantized as they are read.

    Args:
        path: a Hugging Face directory or id (safetensors), or a .gguf file (any part of a split one).
        quantize: a number format (`nf4`, `fp4`, `int4`, `int8`), "none", or for a .gguf "keep": linear layers, output
            head and embedding in the file's own blocks. None: "keep" for a .gguf, "none" for the rest.
        search: choose each block's scale for the least error (nf4, fp4).
        dtype: of all that stays unquantized and of the computation; "auto" is bfloat16 where native, else float32.
        device: "cpu", "cuda" or "cuda:N"; "auto" is a GPU where torch sees one. Weights are quantized on the CPU.

    Raises:
        InputError: a source, architecture or format that is not known; missing, unexpected or misshapen tensors.
    """
    source = open_source(str(path))
    quantize = quantize or (AS_STORED if source.gguf else UNQUANTIZED)
    where = resolve_device(device)
    model = load_source(
        source, quantize, double_quant, block_size, resolve_dtype(dtype, where), search=search, device=where
    )
    return model, source.tokenizer


def load_source(
    source: ModelSource, quantize: str, double_quant: bool, block_size: int, dtype: torch.dtype, *,
    search: bool = False, device: torch.device = _CPU,
) -> PreTrainedModel:  # fmt: skip
    """Build and fill the model of an open source; see `load`."""
    if quantize not in (UNQUANTIZED, AS_STORED):
        get_format(quantize).encoder(search)
        check_block_size(block_size)
    model = build_on_meta(source, dtype)
    tensors = match_tensors(model, source)
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{source.path}: {type(model).__name__} has no output head, so it is not a language model")
    as_stored = weights_as_stored(model, source, quantize, dtype)
    blocks = {name: weight.blocks for name, weight in as_stored.items() if weight.blocks is not None}
    prequantized = as_stored.keys() - blocks.keys()
    streamed = {name: tensor for name, tensor in tensors.items() if name not in prequantized} | blocks
    places = Places(model, set(source.weights.names()), dtype, device)
    quantizes = quantize not in (UNQUANTIZED, AS_STORED) and not prequantized
    linear = linear_weights(model, head) if quantizes else set()

    def sink(name: str) -> PieceQuantizer | _PieceJoiner:
        stored = streamed[name]
        if name in places.buffers:
            return _PieceJoiner(stored.shape, places.buffers[name].dtype)
        if name in blocks:
            return _PieceJoiner(stored.shape, torch.uint8, as_stored[name].format)
        if name not in linear and not (quantizes and name in places.experts):
            return _PieceJoiner(stored.shape, dtype)
        return PieceQuantizer(
            stored.shape, stored.dtype,
            format=quantize, block_size=block_size, double_quant=double_quant, search=search,
            name=f"{source.path}: {name}",
        )  # fmt: skip

    with closing(stream(list(streamed.values()), map(sink, streamed))) as filled:
        for name, complete in zip(streamed, filled, strict=True):
            places.put(name, complete.finish())
    if source.prequantized is not None:
        for name in as_stored:
            places.put(name, source.prequantized.weight(name).read())
    _finish(model, device)
    return model


def _finish(model: PreTrainedModel, device: torch.device) -> None:
    """What is to be done once every tensor of the files is in its place."""
    tie_weights(model)
    compute_buffers(model, device)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    head.register_forward_pre_hook(_contiguous_input)
    model.requires_grad_(False).eval()
    make_fast(model)


class _PieceJoiner:
    """A tensor that comes piece by piece and is only put together: converted to `dtype`, or bytes of a GGUF `type`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, type: str | None = None) -> None:
        self._type = type
        self._joined = torch.empty(shape, dtype=dtype)

    def take(self, start: int, piece: Tensor) -> None:
        """The elements from `start` on, (n,)."""
        self._joined.view(-1)[start : start + len(piece)] = piece

    def finish(self) -> Tensor | QuantizedTensor:
        """The tensor, once everything is taken."""
        return self._joined if self._type is None else as_stored_tensor(self._joined, self._type)


def _contiguous_input(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    """Given a slice of the hidden states (one position a row, in generation), PyTorch's bf16 linear copies the head's
    weight once a row: 1.8 GB for 32 rows of SmolLM2. Given contiguous input it does not."""
    return (arguments[0].contiguous(),)
