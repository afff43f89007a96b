"""An adapter laid over a base that is not in memory: what it makes of each tensor.

The layer that trained is made over one weight at a time and fused (lora/fusing.py), so that a variant of LoRA is known
to its layer alone.
"""

import copy

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.exporting.base_tensors import BaseTensors, BaseWeight
from entrenar.files.peft import PeftAdapter
from entrenar.files.peft_tensors import ROWS_END
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import adapt, adaptable_names, expected_layers, refuse_breaking
from entrenar.lora.fusing import Fused, fuse, fuse_expert
from entrenar.lora.grown import check_tokens, is_same, new_rows
from entrenar.lora.initial import start_again
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.matching import check_complete, named_by
from entrenar.lora.saved import check_saved
from entrenar.lora.spec import spec_of
from entrenar.lora.token_rows import extended, shared_rows
from entrenar.models.experts import ExpertWeight


class Overlay:
    """The adapter and the base that it is for.

    Attributes:
        is_untied: whether a tied head and embedding become two; the base then has a tensor for the head.

    Raises:
        InputError: an adapter that is not for this model, or not whole.
    """

    def __init__(self, base: BaseTensors, adapter: PeftAdapter) -> None:
        self._base, self._adapter, self._spec = base, adapter, spec_of(adapter)
        self._rows, self._grown = self._token_rows(), self._new_rows()
        self._check_names()
        self.is_untied = base.is_tied and not self._stays_tied()
        if self.is_untied:
            base.untie()
        self._check_base()

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head, those of new tokens included."""
        return max(self._base.vocabulary, self._adapter.needs_rows)

    def layer(self, name: str) -> str | None:
        """The adapted layer of which a tensor is the weight; None: of none."""
        layer, _, leaf = name.rpartition(".")
        if name in self._base.experts:
            layer = self._base.experts[name].projection
        return layer if leaf == "weight" and layer in self._adapter.tensors.layers else None

    def fused(self, name: str) -> Fused:
        """One tensor."""
        if name in self._adapter.tensors.saved:
            return Fused(self._adapter.tensors.saved[name].float(), None)
        weight, layer = self._base.weight(name), self.layer(name)
        if name in self._base.ends:
            weight = BaseWeight(self._with_new_rows(name, weight.plain), weight.quantized)
        if name in self._rows:
            tokens, rows = self._rows[name]
            return Fused(weight.plain.float().index_copy(0, torch.tensor(tokens), rows.float()), None)
        if layer is None:
            return Fused(weight.dequantized(), None)
        if name in self._base.experts:
            return self._fused_expert(layer, self._base.experts[name], weight.dequantized().float())
        return fuse(self._adapted(layer, weight), weight.plain)

    def _adapted(self, layer: str, weight: BaseWeight) -> AdapterLayer:
        """The adapted layer over this weight, with its tensors."""
        if weight.quantized is not None:
            module: nn.Module = QuantizedLinear(weight.quantized)
        else:
            module = copy.copy(self._base.meta.get_submodule(layer))
            module._parameters = {"weight": nn.Parameter(weight.plain, requires_grad=False), "bias": None}
        adapted = adapt(layer, module, self._spec, start_again(self._adapter, lambda _: weight.plain))
        values = self._adapter.tensors.layers[layer]
        for end, parameter in adapted.file_tensors().items():
            if parameter.shape != values[end].shape:
                shapes = f"{tuple(values[end].shape)} at {layer}, where the model needs {tuple(parameter.shape)}"
                raise InputError(f"the adapter has a tensor of shape {shapes}")
            parameter.data.copy_(values[end])
        return adapted

    def _fused_expert(self, layer: str, expert: ExpertWeight, before: Tensor) -> Fused:
        experts = self._base.experts.values()
        count = sum(other.projection == layer and other.role == expert.role for other in experts)
        spec, (a, b) = self._spec.for_layer(layer), self._adapter.factors[layer]
        parts = 1 if expert.role == "down" else 2
        wanted = (count * spec.rank, expert.shape[1]), (parts * expert.shape[0], spec.rank * count)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise InputError(
                f"the adapter has tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} at {layer}, where the model "
                f"needs {wanted[0]} and {wanted[1]}"
            )
        part = int(expert.role == "up")
        return fuse_expert(before, a, b, spec.scale, count=count, index=expert.index, part=part)

    def _check_names(self) -> None:
        """InputError unless the adapter has just the layers, whole modules and rows that its config names here."""
        base, adapter = self._base, self._adapter
        layers, saved = list(adapter.tensors.layers), adapter.tensors.saved
        projections = {expert.projection for expert in base.experts.values()}
        known = {*adaptable_names(base.meta)} | projections
        shapes = {name: tuple(p.shape) for name, p in base.meta.named_parameters(remove_duplicate=False)}
        shapes |= {name: (self.vocabulary, *shapes[name][1:]) for name in base.ends}
        rows = {f"{name.removesuffix('weight')}{ROWS_END}" for name in self._rows}
        unknown = [name for name in layers if name not in known]
        unknown += [n for n, tensor in saved.items() if shapes.get(n) != tuple(tensor.shape) and n not in rows]
        if unknown:
            raise InputError(f"the adapter is for layers this model does not have: {listing(unknown, 3)}")
        refuse_breaking(base.meta, layers)
        expected = {*expected_layers(base.meta, self._spec)} - projections
        experts = named_by(sorted(projections), adapter.target_parameters)
        check_complete(layers, [*expected, *experts], "the adapter")
        check_saved(base.meta, adapter.modules_to_save, saved)

    def _check_base(self) -> None:
        """InputError where the base's own weights, which peft writes beside an adapted head, are not the model's.

        Left out are a tied head, which is the embedding, and what the files have quantized, which is rounded.
        """
        stored = set(self._base.names())
        for name, tensor in self._adapter.tensors.base.items():
            if name not in stored or (self._base.is_prequantized(name) and name not in self._base.ends):
                continue
            weight = self._base.plain(name)
            if not is_same(weight, tensor[: len(weight)]):  # rows of new tokens come after the base's
                raise InputError(f"the adapter was trained on another base: its {name} is not this model's")

    def _token_rows(self) -> dict[str, tuple[list[int], Tensor]]:
        """Weights of which the adapter has rows of its own → the tokens, and their rows."""
        adapter = self._adapter
        if not adapter.token_indices:
            return {}
        names = [name.removesuffix(".weight") for name in self._base.ends]
        chosen, shares = shared_rows(
            names, adapter.token_indices, tied=self._base.is_tied, keeps_ties=adapter.keeps_ties
        )
        trained: dict[str, tuple[list[int], Tensor]] = {}
        for name, tokens in chosen.items():
            rows = adapter.tensors.saved.get(f"{name}.{ROWS_END}")
            if rows is None or len(rows) != len(tokens):
                raise InputError(f"the adapter has no rows for {len(tokens)} tokens of {name}: save it again")
            trained |= {f"{path}.weight": (tokens, rows) for path in (names if shares else [name])}
        twice = [name for name in trained if name in adapter.tensors.saved or self.layer(name)]
        if twice:
            raise InputError(f"{listing(twice)} is adapted or trained whole, and has rows trained apart: not read")
        return trained

    def _new_rows(self) -> dict[str, Tensor]:
        """Weights of a vocabulary that has grown → the rows that the base had there, where the adapter says so."""
        base, adapter = self._base, self._adapter
        if adapter.needs_rows <= base.vocabulary:
            return {}
        check_tokens(adapter, base.vocabulary, "the adapter")
        return new_rows(base.ends, adapter, base.vocabulary, "the adapter", tied=base.is_tied)

    def _with_new_rows(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the rows of new tokens."""
        if self.vocabulary <= len(weight):
            return weight
        weight = extended(weight, self.vocabulary)
        if name in self._grown:
            weight[self._base.vocabulary :] = self._grown[name].to(weight.dtype)
        return weight

    def _stays_tied(self) -> bool:
        embedding, output = self._base.ends
        rows, saved = self._rows, self._adapter.tensors.saved
        if self.layer(embedding) or self.layer(output) or (output in rows) is not (embedding in rows):
            return False
        if output in rows and rows[output][1] is not rows[embedding][1]:
            return False
        return self._adapter.keeps_ties or not saved.keys() & {embedding, output}
