"""What of a trained change is in the written weights: the share that survives, and the error, module by module."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from entrenar.lora.fusing import Fused

REPORT_NAME = "fidelity.json"


@dataclass(frozen=True)
class ModuleFidelity:
    """One weight.

    Attributes:
        survival: ⟨written − before, Δ⟩ / ⟨Δ, Δ⟩ with Δ = fused − before; 1: all of the trained change is there. None
            for a weight without a change.
        error: ‖written − fused‖ / ‖fused‖.
        change: ‖Δ‖ / ‖before‖.
    """

    name: str
    survival: float | None
    error: float
    change: float


def measure(name: str, fused: Fused, written: Tensor) -> ModuleFidelity:
    """Compare what was written, decoded, with what was to be written."""
    weight, written = fused.weight.float(), written.float()
    error = ((written - weight).norm() / weight.norm().clamp_min(1e-30)).item()
    if fused.before is None:
        return ModuleFidelity(name, None, error, 0.0)
    delta = weight - fused.before
    square = delta.square().sum().item()
    change = (delta.norm() / fused.before.norm().clamp_min(1e-30)).item()
    survival = ((written - fused.before) * delta).sum().item() / square if square else None
    return ModuleFidelity(name, survival, error, change)


@dataclass(frozen=True)
class Fidelity:
    """The report of a whole export; `text`: loss, perplexity and KL on given text, in nats per token, if measured."""

    base: str
    type: str
    modules: list[ModuleFidelity]
    text: dict[str, float] | None = None

    @property
    def survival(self) -> float | None:
        """Mean share over the adapted modules, weighted by the square of their change."""
        return weighted_survival(self.modules)

    def to_json(self) -> dict[str, Any]:
        """What fidelity.json holds."""
        worst = max((module.error for module in self.modules), default=0.0)
        summary = {"base": self.base, "type": self.type, "survival": self.survival, "worst_error": worst}
        return {**summary, "text": self.text, "modules": [asdict(module) for module in self.modules]}

    def table(self) -> list[str]:
        """Lines for people: one for each kind of module, by the last part of its name."""
        kinds: dict[str, list[ModuleFidelity]] = defaultdict(list)
        for module in self.modules:
            kinds[module.name.removesuffix(".weight").rpartition(".")[2]].append(module)
        rows = [_row(kind, modules) for kind, modules in kinds.items()]
        return [f"{'module':16} {'count':>5} {'Δ survives':>10} {'worst':>8} {'error':>9} {'Δ/W':>8}", *rows]


def fidelity_table(path: Path) -> list[str]:
    """The table of an export's directory; nothing for an export without a report or without a change."""
    if not (path / REPORT_NAME).is_file():
        return []
    report = json.loads((path / REPORT_NAME).read_text(encoding="utf-8"))
    modules = [ModuleFidelity(**module) for module in report["modules"]]
    lines = Fidelity(report["base"], report["type"], modules).table() if modules else []
    return [*lines, *(f"{key}: {value:.6g}" for key, value in (report["text"] or {}).items())]


def weighted_survival(modules: Iterable[ModuleFidelity]) -> float | None:
    """Mean share of those with a change, weighted by its square."""
    known = [(module.survival, module.change**2) for module in modules if module.survival is not None]
    total = sum(weight for _, weight in known)
    return sum(share * weight for share, weight in known) / total if total else None


def _row(kind: str, modules: list[ModuleFidelity]) -> str:
    shares = [module.survival for module in modules if module.survival is not None]
    mean, worst = weighted_survival(modules), min(shares, default=None)
    numbers = " ".join("-".rjust(w) if x is None else f"{x:{w}.2%}" for x, w in ((mean, 10), (worst, 8)))
    error, change = max(module.error for module in modules), max(module.change for module in modules)
    return f"{kind:16} {len(modules):5} {numbers} {error:9.3%} {change:8.2%}"
