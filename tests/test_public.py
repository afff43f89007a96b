"""The public names: listed, found, and loaded only when used."""

import importlib.metadata
import subprocess
import sys

import pytest

import entrenar


def test_the_list_is_what_there_is() -> None:
    assert sorted(entrenar.__all__) == sorted(entrenar._HOMES)
    assert list(entrenar.__all__) == sorted(entrenar.__all__, key=str)


@pytest.mark.parametrize("name", entrenar.__all__)
def test_every_name_is_found_and_documented(name: str) -> None:
    thing = getattr(entrenar, name)
    assert thing.__name__ == name
    assert thing.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = entrenar.tarin  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, entrenar; assert not {'torch', 'transformers', 'numpy', 'pyarrow'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_installed_version_is_the_packages() -> None:
    """pyproject.toml reads it from there."""
    assert importlib.metadata.version("entrenar") == entrenar.__version__
