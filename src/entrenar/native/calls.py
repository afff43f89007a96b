"""Calling the library: a function by name, tensors as addresses and bytes."""

import ctypes
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.native import abi
from entrenar.native.library import loaded

_BUFFER = (ctypes.c_void_p, ctypes.c_int64)
_TYPES = {
    "n": (ctypes.c_int64,), "i": (ctypes.c_int,), "f": (ctypes.c_float,), "p": (ctypes.c_void_p,),
    "b": _BUFFER, "s": _BUFFER,
}  # fmt: skip


class Function:
    """An exported function of the library, by its name in `abi.FUNCTIONS`, whose letters say how it is called."""

    def __init__(self, name: str) -> None:
        self.name, self.signature = name, abi.FUNCTIONS[name]

    def __call__(self, *args: Tensor | float | None) -> None:
        """Call it; InputError with what is wrong if it refuses."""
        values: list[float | None] = []
        for letter, value in zip(self.signature, args, strict=True):
            if letter == "b":
                values += buffer(value)
            elif letter == "s":
                values += _strided(value)
            else:
                assert isinstance(value, int | float)
                values.append(value)
        code = self._function(*values)
        if code:
            raise InputError(f"entrenar_{self.name} refused its arguments: {abi.error_sentence(code)}")

    @cached_property
    def _function(self) -> Callable[..., int]:
        library = loaded()
        assert library is not None, "callers ask available() first"
        function = library[f"entrenar_{self.name}"]
        function.argtypes = [kind for letter in self.signature for kind in _TYPES[letter]]
        return function


def buffer(tensor: Tensor | float | None) -> list[int | None]:
    """Address and bytes of a contiguous CPU tensor; a null pointer for None."""
    if tensor is None:
        return [None, 0]
    assert isinstance(tensor, Tensor)
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return [tensor.data_ptr(), tensor.nbytes]


def _strided(tensor: Tensor | float | None) -> list[int | None]:
    assert isinstance(tensor, Tensor)
    assert tensor.device.type == "cpu"
    before = int(tensor.storage_offset()) * tensor.element_size()
    return [tensor.data_ptr(), tensor.untyped_storage().nbytes() - before]


_scratch = Function("scratch")


def scratch(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) of this thread's scratch, count > 0: overwritten by its next residual block."""
    address, size = ctypes.c_void_p(), count * dtype.itemsize
    _scratch(size, ctypes.addressof(address))
    assert address.value is not None
    return torch.frombuffer((ctypes.c_char * size).from_address(address.value), dtype=dtype)
