"""Names that say nothing are not used, and helpers of tests lie where tests look for them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each could be anything that a function has: the name has to say what it is.
VAGUE = {"found", "made", "held", "own", "each", "kept"}


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, parameter and attribute that is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_names_say_what_a_thing_is() -> None:
    package = ROOT / "src" / "entrenar"
    vague = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted(package.rglob("*.py"))
        for line, name in _names(ast.parse(path.read_text(encoding="utf-8")))
        if name.lstrip("_") in VAGUE
    ]
    assert vague == []


def test_names_in_the_kernels_say_what_a_thing_is() -> None:
    name = re.compile(rf"\b(?:{'|'.join(sorted(VAGUE))})_?\b")
    vague = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "csrc").glob("*/*"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if name.search(line.partition("//")[0])
    ]
    assert vague == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_of_the_tests_only_support_is_imported(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    levels = [node.level for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(levels)
    assert [name for name in modules if name.startswith(("tests", "conftest", "test_"))] == [
        name for name in modules if name.startswith("tests.support")
    ]
