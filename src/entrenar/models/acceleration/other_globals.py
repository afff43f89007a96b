"""A function's code with other functions in place of some of its module's global ones.

An attention class of transformers reads its rotation (`apply_rotary_pos_emb` in most files) from its module's globals.
To let the class's own forward run without that rotation, or with a faster one, the variable must mean something else
for this forward alone. Three plainer ways were weighed (docs/decisions/0024):

- patching the module while the call lasts changes it for every model and every thread;
- tensors that answer for cos = 1 and sin = 0 (`__torch_function__`) still pay for cutting, negating and joining halves,
  eight operations a layer and token;
- a forward of our own would have to know every class's cache, masks and windows.

So a second function is made of the same code object over a copy of the globals. What it cannot do: replace what the
forward reaches through an attribute, a closure or another function; see a global that is set after the copy was made;
look into a forward that is wrapped by a decorator. Then the class's forward is used as it is. This file alone touches
code objects.
"""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


def global_functions(forward: Any) -> dict[str, Callable[..., Any]]:
    """Variable → function, of the global functions that the code of a forward mentions; none if it is no function."""
    if not isinstance(forward, FunctionType):
        return {}
    names = forward.__globals__
    mentioned = {name: names.get(name) for name in forward.__code__.co_names}
    return {name: value for name, value in mentioned.items() if callable(value) and not isinstance(value, type)}


def with_globals(forward: FunctionType, replacements: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """The same code, in which these global variables mean other functions."""
    names = {**forward.__globals__, **replacements}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed
