"""What a module's class says in its source: how its forward is called, and what it reads off the module.

Numbers on a few inputs cannot show what a forward does elsewhere; a forward that takes one tensor and reads nothing but
a weight and an epsilon can do little else.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def takes_one_tensor(kind: type) -> bool:
    """Whether the class's forward takes one argument beside the module, and no more if it is given more."""
    try:
        parameters = list(inspect.signature(vars_of(kind, "forward")).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@cache
def reads(kind: type) -> frozenset[str] | None:
    """The attributes that the class's forward reads off the module, those of the methods it calls too.

    None if that cannot be told: no source, the module handed on or written to, `super()`.
    """
    found: set[str] = set()
    open_methods, seen = ["forward"], {"forward"}
    while open_methods:
        own = _read_by(vars_of(kind, open_methods.pop()))
        if own is None:
            return None
        methods = {name for name in own if inspect.isfunction(inspect.getattr_static(kind, name, None))}
        found |= own - methods
        open_methods += methods - seen
        seen |= methods
    return frozenset(found)


def vars_of(kind: type, name: str) -> Any:
    """A class's attribute as it is defined, not bound."""
    return inspect.getattr_static(kind, name, None)


def _read_by(function: Callable[..., Any]) -> set[str] | None:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return None
    this = tree.args.args[0].arg
    nodes = [node for statement in tree.body for node in ast.walk(statement)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and _names(node.value, this)]
    alone = sum(_names(node, this) for node in nodes) - len(attributes)
    written = any(not isinstance(node.ctx, ast.Load) for node in attributes)
    return None if alone or written or any(_names(node, "super") for node in nodes) else {n.attr for n in attributes}


def _names(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
