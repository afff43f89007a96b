"""Stand-ins for modules: a class's own forward runs over them with some parts replaced."""

from typing import Any

from torch import Tensor


class ModuleProxy:
    """A module some of whose attributes are replaced; the rest are the module's."""

    def __init__(self, module: Any, **parts: Any) -> None:
        self._module = module
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class ProjectedAttention(ModuleProxy):
    """An attention module whose projections of its input are known; what `parts` does not replace is the module's."""

    def __init__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, **parts: Any) -> None:
        super().__init__(module, q_proj=lambda _: q, k_proj=lambda _: k, v_proj=lambda _: v, **parts)
