"""Several adapters over one base: load, name, switch, switch off, combine.

An adapter is a set of layers over the base's own weights; switching puts another set into the model's places. So every
variant can stand beside every other, each of its own rank and targets, and what is not in use costs only its factors
(and the base's part that it changed, where it started with pissa or loftq).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import PeftAdapter, read_adapter, write_adapter
from entrenar.lora.adapter_io import layers_of
from entrenar.lora.attach import refuse_adapted, replace_modules
from entrenar.lora.combine import combine
from entrenar.lora.grown import make_room
from entrenar.lora.initial import Original, start_again


@dataclass(frozen=True)
class _Set:
    adapter: PeftAdapter
    modules: dict[str, nn.Module]
    trained: list[nn.Parameter]


class Adapters:
    """The adapters of one model; none is in use at first. Names are free; `active` is the one in use, or None."""

    def __init__(self, model: nn.Module) -> None:
        refuse_adapted(model)
        self._model, self._sets = model, dict[str, _Set]()
        self._base: dict[str, nn.Module] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """Every adapter that can be used."""
        return list(self._sets)

    def load(self, directory: str | Path, name: str, *, original: Original | None = None) -> None:
        """Read a PEFT directory as the adapter `name`; `original` as for `load_adapter`."""
        self.add(read_adapter(Path(directory)), name, original=original)

    def add(self, adapter: PeftAdapter, name: str, *, original: Original | None = None) -> None:
        """Take an adapter that is in memory; InputError if the name is taken or it does not fit the model."""
        if name in self._sets:
            raise InputError(f"there is an adapter {name!r} already: choose another name")
        active = self.active
        self.off()
        make_room(self._model, adapter, name)
        modules = layers_of(self._model, adapter, name, start_again(adapter, original))
        trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self._sets[name] = _Set(adapter, modules, trained)
        if active is not None:
            self.use(active)

    def use(self, name: str) -> None:
        """Put the adapter `name` into the model in place of the one in use; its parameters are trained."""
        chosen = self._get(name)
        self.off()
        self._base = replace_modules(self._model, chosen.modules)
        for parameter in chosen.trained:
            parameter.requires_grad_(True)
        for module in chosen.modules.values():
            module.train(self._model.training)
        self.active = name

    def off(self) -> None:
        """The base alone."""
        replace_modules(self._model, self._base)
        self._base, self.active = {}, None

    def combine(
        self,
        weights: Mapping[str, float],
        name: str,
        method: str = "svd",
        *,
        rank: int | None = None,
        density: float = 0.5,
        seed: int = 0,
    ) -> float:
        """Make one adapter of several, `name`, and return the share that its rank lost; see lora/combine.py."""
        adapters = {known: one.adapter for known, one in self._sets.items()}
        combined = combine(adapters, weights, method, rank=rank, density=density, seed=seed)
        self.add(combined.adapter, name)
        return combined.error

    def save(self, name: str, directory: str | Path) -> None:
        """Write the adapter `name` as it was loaded or combined, as a PEFT directory."""
        write_adapter(Path(directory), self._get(name).adapter)

    def _get(self, name: str) -> _Set:
        if name not in self._sets:
            raise InputError(f"there is no adapter {name!r}: there are {listing(self.names) or 'none'}")
        return self._sets[name]
