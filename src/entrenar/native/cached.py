"""Views of tensors for the native library, kept from call to call: the one mechanism for it.

A view holds addresses, so it is right for as long as its tensors lie where they lay: FSDP moves them between uses, an
optimiser may replace them, a copy of a layer has others.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Cached(Generic[T]):
    """One value and the key it was made for. Copies and pickles of it are empty: addresses mean nothing elsewhere."""

    __slots__ = ("_key", "_value")

    def __init__(self) -> None:
        self._key: object = None
        self._value: T | None = None

    def get(self, key: object, make: Callable[[], T], *, keeps: Callable[[T], bool] | None = None) -> T:
        """The value of `key`: the one that is here, or a new one.

        Args:
            key: of places of tensors, or `ids` of objects that the value holds on to (else an id may be reused).
            keeps: whether a new value may serve again; None: always. One that points into copies may not: the tensors
                that were copied can change in place.
        """
        value = self._value
        if value is not None and self._key == key:
            return value
        value = make()
        if keeps is None or keeps(value):
            self._key, self._value = key, value
        return value

    def __deepcopy__(self, _: dict[int, Any]) -> "Cached[T]":
        """Empty."""
        return Cached()

    def __reduce__(self) -> tuple[type["Cached[T]"], tuple[()]]:
        """Empty."""
        return Cached, ()


def place(tensor: Tensor | None) -> object:
    """Where a tensor lies and how: it may be given a view of its own memory as another dtype."""
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def ids(*objects: object) -> tuple[int, ...]:
    """Which objects these are."""
    return tuple(map(id, objects))
