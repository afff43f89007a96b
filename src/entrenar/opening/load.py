"""Load a causal language model: config → model on `meta` → each tensor read, quantized, placed.

There are never two copies of the base, and never more of it in 16 or 32 bits than a few pieces of a tensor, which
several threads read and quantize (files/stream.py). A GGUF's own blocks are not even decoded (`keep`).
"""

from contextlib import closing
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from entrenar.core.errors import InputError, listing
from entrenar.files.stream import stream
from entrenar.gguf.reader import is_decoded
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.models.acceleration.confirmed import make_fast
from entrenar.models.experts import ExpertsBuilder, expert_weights, parameter_name
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.match import is_tied, match_tensors, saved_buffers
from entrenar.opening.source import ModelSource, open_source
from entrenar.ops.linear.gguf import FLOAT_TYPES
from entrenar.quant.registry import KEPT_FORMATS, check_block_size, get_format
from entrenar.quant.tensor import PieceQuantizer, QuantizedTensor, kept_tensor

UNQUANTIZED, KEEP = "none", "keep"
_CPU = torch.device("cpu")
_MAX_COMPUTED = 1 << 30  # bytes; masks and sinusoids of the largest have some 100 MB


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
    quantize = quantize or (KEEP if source.blocks else UNQUANTIZED)
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
    if quantize not in (UNQUANTIZED, KEEP):
        get_format(quantize).encoder(search)
        check_block_size(block_size)
    model = build_on_meta(source, dtype)
    tensors = match_tensors(model, source)
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{source.path}: {type(model).__name__} has no output head, so it is not a language model")
    packed = _packed_names(source, quantize)
    for name in packed:
        del tensors[name]
    kept = kept_types(model, source, dtype) if quantize == KEEP else {}
    if source.blocks:
        tensors |= {name: source.blocks.packed(name) for name in kept}
    quantizes = quantize not in (UNQUANTIZED, KEEP) and not packed
    experts = ExpertsBuilder(model, expert_weights(model, set(source.weights.names())))
    linear = linear_weights(model, head) if quantizes else set()
    buffers = saved_buffers(model)

    def place(name: str, weight: Tensor | QuantizedTensor) -> None:
        if name in experts:
            experts.take(name, weight.to(device))
        elif name in buffers:
            _place_buffer(model, name, cast(Tensor, weight).to(device))
        else:
            _place(model, parameter_name(name), weight.to(device), dtype)

    def sink(name: str) -> PieceQuantizer | _PieceJoiner:
        stored = tensors[name]
        if name in buffers:
            return _PieceJoiner(stored.shape, buffers[name].dtype, None)
        if name not in linear and not (quantizes and name in experts):
            return _PieceJoiner(stored.shape, dtype, kept.get(name))
        return PieceQuantizer(
            stored.shape, stored.dtype,
            format=quantize, block_size=block_size, double_quant=double_quant, search=search,
            name=f"{source.path}: {name}",
        )  # fmt: skip

    with closing(stream(list(tensors.values()), map(sink, tensors))) as filled:
        for name, held in zip(tensors, filled, strict=True):
            place(name, held.finish())
    if source.prequantized is not None:
        for name in packed:
            place(name, source.prequantized.weight(name).read())
    _tie(model)
    _compute_buffers(model, device)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    head.register_forward_pre_hook(_contiguous_input)
    model.requires_grad_(False).eval()
    make_fast(model)
    return model


def _packed_names(source: ModelSource, quantize: str) -> list[str]:
    """Weights that the files hold quantized, which are taken over as they are.

    Raises:
        InputError: they are in another format than `quantize`: they are not quantized twice.
    """
    packed = source.prequantized.formats() if source.prequantized else {}
    others = sorted({format for format, _ in packed.values()} - {quantize})
    if others and quantize != UNQUANTIZED:
        raise InputError(
            f"{source.path} is quantized as {listing(others)} already: set quantize to that or to none to hold it so"
        )
    return list(packed)


def kept_types(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype) -> dict[str, str]:
    """Parameter → its type in the GGUF, for every one that stays as the file holds it, given the compute dtype.

    Matrices of linear layers and the embedding; those that are of the compute dtype are ordinary parameters anyway.

    Raises:
        InputError: the source is no GGUF, or holds a matrix in a type that is not known.
    """
    if source.blocks is None:
        raise InputError(
            f"quantize: keep holds a GGUF's own blocks, but {source.path} is not a .gguf file: choose nf4, another "
            "format or none"
        )
    names = linear_weights(model, None) | _embedding_weights(model)
    types = {name: source.blocks.type_of(name) for name in names & set(source.blocks.names())}
    strange = {name: type for name, type in types.items() if type not in KEPT_FORMATS}
    for name, type in strange.items():
        if is_decoded(type):
            raise InputError(
                f"{source.path}: {name} is {type}, which is not kept as it is (kept are {', '.join(KEPT_FORMATS)}): "
                f"set quantize to none, nf4 or another format, which decode it"
            )
        raise InputError(f"{source.path}: {name} is {type}, which is not read: allowed are {', '.join(KEPT_FORMATS)}")
    return {name: type for name, type in types.items() if FLOAT_TYPES.get(type) != dtype}


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


class _PieceJoiner:
    """A tensor that comes piece by piece and is only put together: converted to `dtype`, or bytes of a type of GGUF."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, type: str | None) -> None:
        self._type = type
        self._joined = torch.empty(shape, dtype=dtype if type is None else torch.uint8)

    def take(self, start: int, piece: Tensor) -> None:
        """The elements from `start` on, (n,)."""
        self._joined.view(-1)[start : start + len(piece)] = piece

    def finish(self) -> Tensor | QuantizedTensor:
        """The tensor, once everything is taken."""
        return self._joined if self._type is None else kept_tensor(self._joined, self._type)


def _contiguous_input(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    """Given a slice of the hidden states (one position a row, in generation), PyTorch's bf16 linear copies the head's
    weight once a row: 1.8 GB for 32 rows of SmolLM2. Given contiguous input it does not."""
    return (arguments[0].contiguous(),)


def linear_weights(model: PreTrainedModel, head: nn.Module | None) -> set[str]:
    """Names of the parameters that a number format may hold; not those of `head`."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def _embedding_weights(model: PreTrainedModel) -> set[str]:
    """Name of the token embedding's table; none where the embedding does more than look rows up."""
    embedding = model.get_input_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is embedding and _is_plain(module)}


def _is_plain(embedding: nn.Module) -> bool:
    return type(embedding) is nn.Embedding and embedding.max_norm is None


def _place(model: PreTrainedModel, name: str, weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> None:
    """A parameter in its module's place; for a quantized weight a layer in the place of the module that has it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(weight, QuantizedTensor):
        if isinstance(module, nn.Embedding):
            layer: nn.Module = QuantizedEmbedding(weight, dtype)
        else:
            assert isinstance(module, nn.Linear)
            layer = QuantizedLinear(weight, module.bias)
        _replace(model, owner, layer)
        return
    parameter = nn.Parameter(weight, requires_grad=False)
    # transformers' own initialisation, run below for computed buffers, must leave this one alone.
    parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(module, leaf, parameter)


def _place_buffer(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """A saved buffer in its module's place, in the dtype that it has there: transformers does not round them either."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tie(model: PreTrainedModel) -> None:
    """One storage for what the architecture ties; transformers cannot tie an embedding that is not a Parameter."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, QuantizedEmbedding):
        model.tie_weights()
    elif is_tied(model):
        model.set_output_embeddings(embedding.tied_linear())  # pyright: ignore[reportArgumentType] - a layer is


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the buffers no checkpoint holds (rotary frequencies, …) by the architecture's own initialisation, on the
    CPU so that they are the same everywhere."""
    wanted = sum(buffer.nbytes for buffer in model.buffers() if buffer.is_meta)
    if wanted > _MAX_COMPUTED:
        raise InputError(
            f"{model.name_or_path}: the sizes of its config ask for {wanted:,} bytes of computed tables, more than any "
            "model has: check config.json"
        )
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not computed:
            continue
        # Initialised again as well are those that the files hold.
        kept = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False) if name not in computed}
        first, second = (_initialised(model, module, computed, start) for start in (0, 1))
        uncomputed = [name for name in computed if not torch.equal(first[name], second[name])]
        if uncomputed:
            raise InputError(f"{type(model).__name__} has buffers that cannot be computed here: {listing(uncomputed)}")
        for name, buffer in (second | kept).items():
            module._buffers[name] = buffer.to(device)


def _initialised(model: PreTrainedModel, module: nn.Module, names: list[str], start: int) -> dict[str, Tensor]:
    """Buffers of a module after transformers' initialisation; `start`, NaN in floats, is what stays without one."""
    for name in names:
        buffer = module.get_buffer(name)
        fill = torch.nan if buffer.is_floating_point() else start
        module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
    model._init_weights(module)
    return {name: module.get_buffer(name).clone() for name in names}
