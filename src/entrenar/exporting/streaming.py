"""Fuse without a model: each tensor is read from the base's files, adapted and handed on; nothing else is in memory.

The layer that trained is made over one weight at a time and asked for its fused weight, so that a variant of LoRA is
known to its layer alone. The base is what the adapter was trained on (`dequantized`: quantized as it was then, and
back), or the weights as the files have them (`original`).
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import BaseFormat, PeftAdapter
from entrenar.lora.attach import adapt, adaptable_names
from entrenar.lora.experts import expert_factors
from entrenar.lora.initial import start_again
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.spec import spec_of
from entrenar.lora.token_rows import ROWS, extended
from entrenar.models.experts import ExpertWeight, expert_weights
from entrenar.models.load import build_on_meta, linear_weights
from entrenar.models.match import match_tensors
from entrenar.models.source import ModelSource
from entrenar.quant.linear import QuantizedLinear
from entrenar.quant.tensor import QuantizedTensor, quantize


@dataclass(frozen=True)
class Fused:
    """A weight as the model that was trained has it, and before the adapter, float32; `before` None: not adapted."""

    weight: Tensor
    before: Tensor | None


class StreamedModel:
    """The tensors of a base with an adapter over it, made one at a time.

    Args:
        base: how the base is held under the adapter; None: as its files have it.

    Raises:
        InputError: an adapter that is not for this model.
    """

    def __init__(self, source: ModelSource, adapter: PeftAdapter | None, base: BaseFormat | None) -> None:
        self.meta = build_on_meta(source, torch.float32)
        self._stored = match_tensors(self.meta, source)
        self._adapter, self._base, self._packed = adapter, base, source.packed
        self._packed_names = source.packed.packed() if source.packed else {}
        head = self.meta.get_output_embeddings()
        assert head is not None
        self._experts = expert_weights(self.meta, set(source.weights.names()))
        self.linear = linear_weights(self.meta, head) | self._experts.keys()
        self._spec = spec_of(adapter) if adapter else None
        self._rows = self._token_rows(head)
        self._check()
        self._add_untied(head)

    def names(self) -> Iterator[str]:
        """Every tensor, in the order of the files."""
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        if name in self._packed_names:
            return self._packed_names[name][1]
        shape = self._stored[name].shape
        return (self.vocabulary, *shape[1:]) if name in self._rows else shape

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head, those of an adapter's new tokens included."""
        new = [1 + max(tokens) for tokens, _ in self._rows.values()]
        return max(self.meta.config.get_text_config().vocab_size, *new, 0)

    @property
    def is_untied(self) -> bool:
        """Whether the adapter has made a tied head and embedding two."""
        return self._untied

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts."""
        return bool(self._experts)

    def is_adapted(self, name: str) -> bool:
        """Whether the tensor is the weight of an adapted layer."""
        return self._layer(name) is not None

    def fused(self, name: str) -> Fused:
        """One tensor."""
        adapter, layer = self._adapter, self._layer(name)
        if adapter and name in adapter.tensors.saved:
            return Fused(adapter.tensors.saved[name].float(), None)
        packed = self._packed.quantized(name) if self._packed and name in self._packed_names else None
        weight = self._stored[name].read() if packed is None else packed.dequantize()
        held = packed or (_quantized(weight, self._base) if self._base and name in self.linear else None)
        if name in self._rows:
            tokens, rows = self._rows[name]
            whole = extended(weight.float(), self.vocabulary)
            return Fused(whole.index_copy(0, torch.tensor(tokens), rows.float()), None)
        if layer is None:
            return Fused(weight if held is None else held.dequantize(), None)
        if name in self._experts:
            before = weight.float() if held is None else held.dequantize()
            return Fused(before + self._expert_delta(layer, self._experts[name]), before)
        made = self._make(layer, weight, held)
        before, fused = weight.float(), made.merge_to_f32()
        if made.taken is None:
            before = made.base_to_f32().t() if made.is_transposed else made.base_to_f32()
        return Fused(fused.t() if made.is_transposed else fused, before)

    def _make(self, layer: str, weight: Tensor, held: QuantizedTensor | None) -> AdapterLayer:
        """The adapted layer over this weight, with its tensors."""
        assert self._adapter is not None
        assert self._spec is not None
        if held is not None:
            module: nn.Module = QuantizedLinear(held)
        else:
            module = copy.copy(self.meta.get_submodule(layer))
            module._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        made = adapt(layer, module, self._spec, start_again(self._adapter, lambda _: weight))
        parameters, values = made.file_tensors(), self._adapter.tensors.layers[layer]
        for end, parameter in parameters.items():
            if parameter.shape != values[end].shape:
                shapes = f"{tuple(values[end].shape)} at {layer}, where the model needs {tuple(parameter.shape)}"
                raise InputError(f"the adapter has a tensor of shape {shapes}")
            parameter.data.copy_(values[end])
        return made

    def _expert_delta(self, layer: str, expert: ExpertWeight) -> Tensor:
        """What the adapter adds to one expert's matrix."""
        assert self._adapter is not None
        assert self._spec is not None
        count = sum(one.projection == layer and one.role == expert.role for one in self._experts.values())
        spec, (a, b) = self._spec.for_layer(layer), self._adapter.factors[layer]
        halves = 1 if expert.role == "down" else 2
        wanted = (count * spec.rank, expert.shape[1]), (halves * expert.shape[0], spec.rank * count)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise InputError(
                f"the adapter has tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} at {layer}, where the model "
                f"needs {wanted[0]} and {wanted[1]}"
            )
        each_a, each_b = expert_factors(a.float(), b.float(), count)
        rows = each_b[expert.index].split(expert.shape[0])[expert.role == "up"]
        return spec.scale * (rows @ each_a[expert.index])

    def _layer(self, name: str) -> str | None:
        layer, _, leaf = name.rpartition(".")
        if name in self._experts:
            layer = self._experts[name].projection
        return layer if leaf == "weight" and self._adapter and layer in self._adapter.tensors.layers else None

    def _check(self) -> None:
        if self._adapter is None:
            return
        layers, known = self._adapter.tensors.layers, set(adaptable_names(self.meta))
        known |= {expert.projection for expert in self._experts.values()}
        unknown = [name for name in layers if name not in known]
        parameters = {name: p.shape for name, p in self.meta.named_parameters(remove_duplicate=False)}
        saved = self._adapter.tensors.saved
        rows = {f"{name.removesuffix('weight')}{ROWS}" for name in self._rows}
        unknown += [name for name, tensor in saved.items() if parameters.get(name) != tensor.shape and name not in rows]
        if unknown:
            raise InputError(f"the adapter is for layers this model does not have: {listing(unknown, 3)}")
        self._check_base(self._adapter.tensors.base)

    def _check_base(self, base: Mapping[str, Tensor]) -> None:
        """InputError where the base's own weights, which peft writes beside an adapted head, are not the model's."""
        for name, tensor in base.items():
            if name not in self._stored or name in self._packed_names:
                continue  # a tied head's, which is the embedding; what is quantized has been rounded
            own = self._stored[name].read()
            if own.shape != tensor.shape or not torch.equal(own.to(tensor.dtype), tensor):
                raise InputError(f"the adapter was trained on another base: its {name} is not this model's")

    def _token_rows(self, head: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
        """Weights of which the adapter has rows of its own → the tokens, and their rows."""
        if self._adapter is None:
            return {}
        names = {id(module): name for name, module in self.meta.named_modules()}
        parts = [names.get(id(self.meta.get_input_embeddings()), ""), names[id(head)]]
        found: dict[str, tuple[list[int], Tensor]] = {}
        for suffix, tokens in self._adapter.token_indices.items():
            part = next((part for part in parts if part == suffix or part.endswith(f".{suffix}")), None)
            rows = self._adapter.tensors.saved.get(f"{part}.{ROWS}")
            if part is None or rows is None or len(rows) != len(tokens):
                raise InputError(f"the adapter has no rows for {len(tokens)} tokens of {suffix}: save it again")
            tied = parts if part == parts[0] and self.meta.config.get_text_config().tie_word_embeddings else [part]
            found |= {f"{one}.weight": (tokens, rows) for one in tied}
        return found

    def _add_untied(self, head: nn.Module) -> None:
        """Where only one of a tied pair is adapted, the head gets a tensor of its own."""
        names = {id(module): name for name, module in self.meta.named_modules()}
        embedding, output = names.get(id(self.meta.get_input_embeddings())), names[id(head)]
        tied = self.meta.config.get_text_config().tie_word_embeddings
        touched = self._adapter.tensors.layers.keys() if self._adapter else set()
        self._untied = bool(tied and touched & {embedding, output})
        if self._untied:
            self._stored.setdefault(f"{output}.weight", self._stored[f"{embedding}.weight"])


def _quantized(weight: Tensor, base: BaseFormat) -> QuantizedTensor:
    return quantize(
        weight, format=base.format, block_size=base.block_size, double_quant=base.double_quant, search=base.search
    )
