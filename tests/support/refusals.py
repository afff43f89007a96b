"""Every way to spoil a C view by one field, and that a call with it is refused before it writes anything."""

import ctypes
from collections.abc import Callable, Iterator

import pytest

from entrenar.core.errors import InputError
from entrenar.native.abi import MemberView, SourceView

# Fields of a SourceView that its kind (dense, 4 bits, 8 bits) does not look at.
_UNUSED = {0: {"block_size"}, 1: {"stride", "dtype"}, 4: {"stride", "dtype"}}
_NO_SIZES = (-1, 2**62, 2**63 - 1)
# How many members there are is not to be seen; a block may be larger than its weight.
_SPOILED_SIZES = {"count": _NO_SIZES, "block_size": (-1, 63)}

Field = tuple[str, ctypes.Structure, str, object]  # where it is, the structure that holds it, its name there, its type


def fields(view: ctypes.Structure, at: str = "") -> Iterator[Field]:
    """All fields of a view that are numbers or addresses, those of the structures in it included."""
    for name, kind, *_ in view._fields_:
        if name == "unused" or (isinstance(view, MemberView) and view.rank == 0 and name in "ab"):
            continue
        value = getattr(view, name)
        if isinstance(value, ctypes.Structure):
            yield from fields(value, f"{at}{name}.")
        elif isinstance(value, ctypes.Array):
            for index, one in enumerate(value):
                yield from fields(one, f"{at}{name}[{index}].")
        elif not (isinstance(view, SourceView) and name in _UNUSED[view.kind]):
            yield f"{at}{name}", view, name, kind


def _address_of(view: ctypes.Structure, name: str) -> str | None:
    """The field of the address whose bytes the field `name` counts."""
    names = [field[0] for field in view._fields_]
    return names[names.index(name) - 1] if name.endswith("bytes") else None


def _spoiled(field: Field, optional: Callable[[str], bool]) -> tuple[int | None, ...]:
    """Values of one field that no call may accept."""
    at, view, name, kind = field
    value = getattr(view, name)
    address = _address_of(view, name)
    if kind is ctypes.c_void_p:
        return () if value is None or optional(at) else (None,)
    if address is not None:
        return () if getattr(view, address) is None else (value - 1, -1)
    if kind is ctypes.c_int64:
        return _SPOILED_SIZES.get(name, (value + 1, *_NO_SIZES))
    return (99,) if kind is ctypes.c_int32 else ()


def contents(found: list[Field]) -> list[bytes]:
    """What is in all the buffers."""
    return [
        ctypes.string_at(address, getattr(view, name))
        for _, view, name, _ in found
        if (holder := _address_of(view, name)) and (address := getattr(view, holder)) is not None
    ]


def assert_refuses(call: Callable[[], object], found: list[Field], optional: Callable[[str], bool]) -> int:
    """Call with each field spoiled in turn, then put right again; how many calls that were."""
    before, calls = contents(found), 0
    for field in found:
        at, view, name, _ = field
        right = getattr(view, name)
        for wrong in _spoiled(field, optional):
            setattr(view, name, wrong)
            try:
                with pytest.raises(InputError, match="refused its arguments"):
                    call()
            except BaseException as error:
                error.add_note(f"{at} was {wrong}, right is {right}")
                raise
            finally:
                setattr(view, name, right)
            calls += 1
            assert contents(found) == before, f"{at} was {wrong}: something was written"
    return calls
