"""Load a causal language model: config → model on `meta` → each tensor read, quantized, placed.

There are never two copies of the base, and never the whole model in 16 or 32 bits.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.errors import InputError, listing
from entrenar.models.compute import resolve_dtype
from entrenar.models.source import ModelSource, open_source
from entrenar.quant.linear import QuantizedLinear
from entrenar.quant.registry import check_block_size, get_format
from entrenar.quant.tensor import quantize as quantize_tensor

UNQUANTIZED = "none"


def load(
    path: str,
    quantize: str = UNQUANTIZED,
    *,
    double_quant: bool = False,
    block_size: int = 64,
    dtype: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, the linear layers (not the output head) quantized as they are read.

    Args:
        path: a Hugging Face directory or id (safetensors), or a .gguf file.
        quantize: a number format (`nf4`, `fp4`, `int4`, `int8`) or "none".
        dtype: of all that stays unquantized and of the computation; "auto" is bfloat16 where native, else float32.

    Raises:
        InputError: a source, architecture or format that is not known; missing, unexpected or misshapen tensors.
    """
    source = open_source(path)
    return load_source(source, quantize, double_quant, block_size, resolve_dtype(dtype)), source.tokenizer


def load_source(
    source: ModelSource, quantize: str, double_quant: bool, block_size: int, dtype: torch.dtype
) -> PreTrainedModel:
    """Build and fill the model of an open source; see `load`."""
    if quantize != UNQUANTIZED:
        get_format(quantize)
        check_block_size(block_size)
    model = build_on_meta(source, dtype)
    _check_names(model, source)
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{source.path}: {type(model).__name__} has no output head, so it is not a language model")
    for name, parameter in list(model.named_parameters()):
        if name not in source.weights.names():
            continue  # tied: it gets its storage from tie_weights below
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # No variable holds what is read: the next tensor must not be read while this one is still there.
        if quantize != UNQUANTIZED and leaf == "weight" and isinstance(module, nn.Linear) and module is not head:
            packed = quantize_tensor(
                _read(source, name, tuple(parameter.shape)),
                format=quantize, block_size=block_size, double_quant=double_quant, name=f"{source.path}: {name}",
            )  # fmt: skip
            _replace(model, owner, QuantizedLinear(packed, module.bias))
        else:
            _place(module, leaf, _own(_read(source, name, tuple(parameter.shape)), dtype))
    _check_tied(model, source)
    model.tie_weights()
    _compute_buffers(model)
    head.register_forward_pre_hook(_contiguous_input)
    return model.requires_grad_(False).eval()


def build_on_meta(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with every tensor on the `meta` device: shapes without memory."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    except Exception as error:
        reason = f"{error}".strip().split("\n")[0]
        raise InputError(f"{source.path} is not a causal language model that transformers knows: {reason}") from None
    model.generation_config.update(**(source.generation.to_diff_dict() if source.generation else {}))
    model.name_or_path = str(source.path)
    return model


def _check_names(model: PreTrainedModel, source: ModelSource) -> None:
    """InputError unless the source has exactly the model's parameters (a tied head may be there or not)."""
    have = set(source.weights.names())
    wanted = {name for name, _ in model.named_parameters()}
    optional = set(_tied_names(model)) | {name for name in have if name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(wanted - have - optional), sorted(have - wanted - optional)
    if missing:
        raise InputError(f"{source.path} lacks {len(missing)} tensors of {type(model).__name__}: {listing(missing, 5)}")
    if unexpected:
        raise InputError(
            f"{source.path} has {len(unexpected)} tensors that {type(model).__name__} lacks: {listing(unexpected, 5)}"
        )


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameter → the one whose storage it shares."""
    tied = model._tied_weights_keys if model.config.get_text_config().tie_word_embeddings else None
    return dict(tied or {})


def _check_tied(model: PreTrainedModel, source: ModelSource) -> None:
    """InputError when the source holds a tied tensor with values of its own: one of the two would be lost."""
    have = set(source.weights.names())
    for name, origin in _tied_names(model).items():
        if {name, origin} <= have and not torch.equal(source.weights.read(name), source.weights.read(origin)):
            raise InputError(
                f"{source.path}: {name} differs from {origin} but the config ties them: set tie_word_embeddings false"
            )


def _read(source: ModelSource, name: str, shape: tuple[int, ...]) -> Tensor:
    weight = source.weights.read(name)
    if tuple(weight.shape) != shape:
        raise InputError(f"{source.path}: {name} has shape {tuple(weight.shape)} but the config says {shape}")
    if not weight.is_floating_point():
        raise InputError(f"{source.path}: {name} is {weight.dtype}, a quantized checkpoint: point to its original")
    return weight


def _own(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype` that does not lean on the file's mapping."""
    return weight.to(dtype, copy=True).contiguous()


def _contiguous_input(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    """Given a slice of the hidden states (one position a row, in generation), PyTorch's bf16 linear copies the head's
    weight once a row: 1.8 GB for 32 rows of SmolLM2. Given contiguous input it does not."""
    return (arguments[0].contiguous(),)


def _place(module: nn.Module, leaf: str, weight: Tensor) -> None:
    parameter = nn.Parameter(weight, requires_grad=False)
    # transformers' own initialisation, run below for computed buffers, must leave this one alone.
    parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(module, leaf, parameter)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Fill the buffers no checkpoint holds (rotary frequencies, …) by the architecture's own initialisation."""
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in computed:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu").fill_(torch.nan)
        if computed:
            model._init_weights(module)
        if any(module.get_buffer(name).isnan().any() for name in computed):
            raise InputError(f"{type(model).__name__} has buffers that cannot be computed here: {listing(computed)}")
