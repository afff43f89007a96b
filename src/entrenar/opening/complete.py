"""What of a model no file holds: weights that are tied to others, and buffers that the architecture computes."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError, listing
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.opening.match import is_tied

_MAX_COMPUTED = 1 << 30  # bytes; masks and sinusoids of the largest have some 100 MB


def tie_weights(model: PreTrainedModel) -> None:
    """One storage for what the architecture ties; transformers cannot tie an embedding that is not a Parameter."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, QuantizedEmbedding):
        model.tie_weights()
    elif is_tied(model):
        model.set_output_embeddings(embedding.tied_linear())  # pyright: ignore[reportArgumentType] - a layer is


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
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
