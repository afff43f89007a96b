"""What depends on the batch, seen in a trial pass over a few tokens or known of the kernels."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.linear_cross_entropy import LOGIT_BYTES
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.layers.recompute import Recompute
from entrenar.models.acceleration.activations import decoder_layers, ladder, recompute_inside, saved_per_token
from entrenar.models.acceleration.fast_layers import serve
from entrenar.models.head import output_head, vocabulary_size
from entrenar.objectives.objective import Objective
from entrenar.ops import gpu_kernels
from entrenar.ops.linear.weight import CodebookWeight
from entrenar.planning.memory_plan import HEAP, Activations

MAX_TOKENS = 4096  # of a micro-batch; a larger one gains nothing
_TRIAL_TOKENS = 32
_AT_WORK = 24 << 20  # buffers of MKL, oneDNN and our kernels (measured)
_AT_WORK_GPU = 32 << 20  # cuBLAS' (torch's setting for Hopper)
_GPU_DECODING = 10  # bytes a weight while a reference dequantizes it: an index, and two float32 values
# Bytes that a layer's backward allocates for each byte that the layer saves. Of the layers of composed_blocks.py, by
# the tensors that are alive at once: 0.95 for Llama 1.1B (measured on a CPU: 1.0), more where the MLP is wide.
_TRANSIENT, _TRANSIENT_COMPOSED = 2.0, 1.25


def measured_activations(model: PreTrainedModel, objective: Objective) -> Activations:
    """Of a model in training mode."""
    return Activations(
        layers=len(decoder_layers(model)),
        saved=_saved_per_token(model, objective),
        logits=_logit_bytes(model),
        scratch=_scratch(model),
        heap=HEAP if model.device.type == "cpu" else 1.0,
        transient=_transient(model),
    )


def _saved_per_token(model: PreTrainedModel, objective: Objective) -> dict[Recompute, int]:
    batch = objective.trial([index % vocabulary_size(model) for index in range(_TRIAL_TOKENS)])

    def loss() -> Tensor:
        return objective.loss(model, batch).total

    return {level: saved_per_token(model, level, batch.token_count, loss) for level in ladder(model)}


def _logit_bytes(model: PreTrainedModel) -> int:
    """Of one chunk of the loss: logits over which the gradient is written, and what else is made of them."""
    whole = MAX_TOKENS * vocabulary_size(model) * model.dtype.itemsize
    copies = 1 if type(output_head(model)) is nn.Linear else 3  # autograd has both, and holds some of them
    if model.device.type != "cpu" and not gpu_kernels.are_there():
        copies += 2 * torch.float32.itemsize / model.dtype.itemsize  # z and its softmax in float32
    return round(min(LOGIT_BYTES, whole) * copies)


def _scratch(model: PreTrainedModel) -> int:
    """Of the libraries and our kernels; and on a GPU of the largest of the weights, which are dequantized whole."""
    if model.device.type == "cpu":
        return _AT_WORK
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return _AT_WORK_GPU + max((_decoding_bytes(layer, model.dtype) for layer in layers), default=0)


def _decoding_bytes(layer: QuantizedLinear, dtype: torch.dtype) -> int:
    by_kernel = gpu_kernels.are_there() and isinstance(layer.linear_weight(), CodebookWeight)
    return layer.in_features * layer.out_features * (dtype.itemsize + (0 if by_kernel else _GPU_DECODING))


def _transient(model: PreTrainedModel) -> float:
    composed = serve(model) and not recompute_inside(model) and gpu_kernels.are_there()
    return _TRANSIENT_COMPOSED if composed else _TRANSIENT
