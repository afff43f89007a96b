"""Fuse without a model: each tensor is read from the base's files, adapted and handed on; nothing else is in memory.

The layer that trained is made over one weight at a time and asked for its fused weight, so that a variant of LoRA is
known to its layer alone. The base is what the adapter was trained on (`dequantized`: quantized as it was then, and
back), or the weights as the files have them (`original`).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import BaseFormat, PeftAdapter
from entrenar.files.stored_tensor import StoredTensor
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import adapt, adaptable_names, expected_layers, refuse_breaking
from entrenar.lora.experts import expert_factors
from entrenar.lora.grown import check_tokens, new_rows
from entrenar.lora.initial import start_again
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.matching import check_complete, named_by
from entrenar.lora.saved import check_saved
from entrenar.lora.spec import spec_of
from entrenar.lora.token_rows import ROWS, extended, shared_rows
from entrenar.models.experts import ExpertWeight, expert_weights
from entrenar.opening.build import build_on_meta, linear_weights
from entrenar.opening.match import match_tensors, saved_buffers
from entrenar.opening.source import ModelSource
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
        self._buffers = saved_buffers(self.meta)
        self._adapter, self._base, self._prequantized = adapter, base, source.prequantized
        self._prequantized_names = source.prequantized.formats() if source.prequantized else {}
        head = self.meta.get_output_embeddings()
        assert head is not None
        self._experts = expert_weights(self.meta, set(source.weights.names()))
        self.linear = linear_weights(self.meta, head) | self._experts.keys()
        self._spec = spec_of(adapter) if adapter else None
        self._pair = _weights_of(self.meta, (self.meta.get_input_embeddings(), head))
        self._tied = len(self._pair) == 2 and bool(self.meta.config.get_text_config().tie_word_embeddings)
        self._rows, self._grown = self._token_rows(), self._new_rows()
        self._check()
        self._add_untied()

    def names(self) -> Iterator[str]:
        """Every tensor, in the order of the files."""
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        if name in self._prequantized_names:
            return self._prequantized_names[name][1]
        shape = self._stored[name].shape
        return (self.vocabulary, *shape[1:]) if name in self._pair else shape

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head, those of an adapter's new tokens included."""
        return max(self._rows_before, self._adapter.needs_rows if self._adapter else 0)

    @property
    def _rows_before(self) -> int:
        return int(self.meta.config.get_text_config().vocab_size)

    @property
    def is_untied(self) -> bool:
        """Whether the adapter has made a tied head and embedding two."""
        return self._untied

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts."""
        return bool(self._experts)

    def buffer(self, name: str) -> StoredTensor | None:
        """A tensor that is a buffer of its module, which no type of output rounds; None for a parameter."""
        return self._stored[name] if name in self._buffers else None

    def is_adapted(self, name: str) -> bool:
        """Whether the tensor is the weight of an adapted layer."""
        return self._layer(name) is not None

    def fused(self, name: str) -> Fused:
        """One tensor."""
        adapter, layer = self._adapter, self._layer(name)
        if adapter and name in adapter.tensors.saved:
            return Fused(adapter.tensors.saved[name].float(), None)
        packed = (
            self._prequantized.weight(name).read() if self._prequantized and name in self._prequantized_names else None
        )
        weight = self._stored[name].read() if packed is None else packed.dequantize()
        if name in self._pair:
            weight = self._with_new_rows(name, weight)
        held = packed or (_quantized(weight, self._base) if self._base and name in self.linear else None)
        if name in self._rows:
            tokens, rows = self._rows[name]
            return Fused(weight.float().index_copy(0, torch.tensor(tokens), rows.float()), None)
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
        """InputError unless the adapter is for this model, and whole."""
        if self._adapter is None or self._spec is None:
            return
        layers, known = self._adapter.tensors.layers, set(adaptable_names(self.meta))
        projections = {expert.projection for expert in self._experts.values()}
        unknown = [name for name in layers if name not in known | projections]
        parameters = {name: tuple(p.shape) for name, p in self.meta.named_parameters(remove_duplicate=False)}
        parameters |= {name: (self.vocabulary, *parameters[name][1:]) for name in self._pair}
        saved = self._adapter.tensors.saved
        rows = {f"{name.removesuffix('weight')}{ROWS}" for name in self._rows}
        unknown += [n for n, tensor in saved.items() if parameters.get(n) != tuple(tensor.shape) and n not in rows]
        if unknown:
            raise InputError(f"the adapter is for layers this model does not have: {listing(unknown, 3)}")
        refuse_breaking(self.meta, list(layers))
        expected = {*expected_layers(self.meta, self._spec)} - projections
        experts = named_by(sorted(projections), self._adapter.target_parameters)
        check_complete(list(layers), [*expected, *experts], "the adapter")
        check_saved(self.meta, self._adapter.modules_to_save, saved)
        self._check_base(self._adapter.tensors.base)

    def _check_base(self, base: Mapping[str, Tensor]) -> None:
        """InputError where the base's own weights, which peft writes beside an adapted head, are not the model's."""
        for name, tensor in base.items():
            if name not in self._stored or name in self._prequantized_names:
                continue  # a tied head's, which is the embedding; what is quantized has been rounded
            own = self._stored[name].read()
            if not _agree(own, tensor[: len(own)]):  # rows of new tokens come after the base's
                raise InputError(f"the adapter was trained on another base: its {name} is not this model's")

    def _token_rows(self) -> dict[str, tuple[list[int], Tensor]]:
        """Weights of which the adapter has rows of its own → the tokens, and their rows."""
        if self._adapter is None or not self._adapter.token_indices:
            return {}
        names = [name.removesuffix(".weight") for name in self._pair]
        chosen, shares = shared_rows(
            names, self._adapter.token_indices, tied=self._tied, keeps_ties=self._adapter.keeps_ties
        )
        found: dict[str, tuple[list[int], Tensor]] = {}
        for name, tokens in chosen.items():
            rows = self._adapter.tensors.saved.get(f"{name}.{ROWS}")
            if rows is None or len(rows) != len(tokens):
                raise InputError(f"the adapter has no rows for {len(tokens)} tokens of {name}: save it again")
            found |= {f"{one}.weight": (tokens, rows) for one in (names if shares else [name])}
        twice = [name for name in found if name in self._adapter.tensors.saved or self._layer(name)]
        if twice:
            raise InputError(f"{listing(twice)} is adapted or trained whole, and has rows trained apart: not read")
        return found

    def _new_rows(self) -> dict[str, Tensor]:
        """Weights of a vocabulary that has grown → the rows that the base had there, where the adapter says so."""
        if self._adapter is None or self._adapter.needs_rows <= self._rows_before:
            return {}
        check_tokens(self._adapter, self._rows_before, "the adapter")
        return new_rows(self._pair, self._adapter, self._rows_before, "the adapter", tied=self._tied)

    def _with_new_rows(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the rows of new tokens; the adapter's own word for the old ones must be the same."""
        given = self._adapter.tensors.base.get(name) if self._adapter else None
        if given is not None and not _agree(weight, given[: len(weight)]):
            raise InputError(f"the adapter was trained on another base: its {name} is not this model's")
        if self.vocabulary <= len(weight):
            return weight
        weight = extended(weight, self.vocabulary)
        if name in self._grown:
            weight[self._rows_before :] = self._grown[name].to(weight.dtype)
        return weight

    def _add_untied(self) -> None:
        """Where the two of a tied pair are no longer one, the head gets a tensor of its own."""
        self._untied = self._tied and self._adapter is not None and not self._stays_tied(self._adapter)
        if self._untied:
            embedding, output = self._pair
            self._stored.setdefault(output, self._stored[embedding])

    def _stays_tied(self, adapter: PeftAdapter) -> bool:
        embedding, output = self._pair
        if self._layer(embedding) or self._layer(output) or (output in self._rows) is not (embedding in self._rows):
            return False
        if output in self._rows and self._rows[output][1] is not self._rows[embedding][1]:
            return False
        saved = adapter.tensors.saved
        return adapter.keeps_ties or not saved.keys() & {embedding, output}


def _weights_of(model: nn.Module, parts: Sequence[nn.Module | None]) -> list[str]:
    """The names of the weights of these modules, in their order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(part)]}.weight" for part in parts if part is not None]


def _agree(own: Tensor, given: Tensor) -> bool:
    """Whether two weights are the same, as far as the narrower dtype of the two holds them."""
    return own.shape == given.shape and torch.equal(own.float(), given.to(own.dtype).float())


def _quantized(weight: Tensor, base: BaseFormat) -> QuantizedTensor:
    return quantize(
        weight, format=base.format, block_size=base.block_size, double_quant=base.double_quant, search=base.search
    )
