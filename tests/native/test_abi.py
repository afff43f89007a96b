"""The boundary to csrc/: the library's own account of its layout against Python's."""

import ctypes
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.native import abi, library

needs_library = pytest.mark.skipif(native.file() is None, reason="the native library is not built")
CSRC = Path(__file__).parents[2] / "csrc"


@needs_library
def test_the_library_tells_the_layout_that_python_has() -> None:
    loaded = library.loaded()
    assert loaded is not None
    assert library.layout_difference(loaded) is None
    assert loaded.entrenar_abi().decode() == abi.text()


@needs_library
@pytest.mark.parametrize("structure", abi.STRUCTURES)
def test_a_field_more_or_less_is_noticed(structure: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [*structure._fields_][:-1]
    other = type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(abi, "STRUCTURES", tuple(other if one is structure else one for one in abi.STRUCTURES))
    loaded = library.loaded()
    assert loaded is not None
    assert f"struct {structure.__name__} " in (library.layout_difference(loaded) or "")


@needs_library
def test_a_signature_or_a_constant_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library.loaded()
    assert loaded is not None
    with monkeypatch.context() as patch:
        patch.setitem(abi.FUNCTIONS, "rotary", abi.FUNCTIONS["rotary"] + "i")
        assert "`rotary " in (library.layout_difference(loaded) or "")
    with monkeypatch.context() as patch:
        patch.setitem(abi.CONSTANTS, "kStrip", 32)
        assert library.layout_difference(loaded) == "it has `kStrip 16` where this has `kStrip 32`"
    monkeypatch.delitem(abi.FUNCTIONS, "rotary")
    assert library.layout_difference(loaded) is not None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    "source", ["int nothing;", 'const char* entrenar_abi(void) { return "struct Other 8 a:p@0"; }']
)
def test_a_library_of_another_layout_is_one_sentence_and_not_used(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "libother.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(other)], input=source.encode(), check=True)
    with caplog.at_level(logging.WARNING):
        assert library._checked(other) is None
    (message,) = caplog.messages
    assert "was built from other sources" in message
    assert "`pip install -e .`" in message


def test_every_function_of_the_header_is_one_that_python_compares() -> None:
    declared = re.findall(r"^ENTRENAR_API .*?entrenar_(\w+)\(", (CSRC / "abi" / "abi.h").read_text(), re.MULTILINE)
    assert sorted(declared) == sorted(abi.FUNCTIONS)


@needs_library
def test_a_path_that_is_asked_for_of_a_library_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRENAR_KERNELS", "generic")
    monkeypatch.setattr(library, "layout_difference", lambda _: "it differs")
    with pytest.raises(InputError, match=r"'generic' but .* was built from other sources"):
        library.loaded.__wrapped__()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_definition_with_another_signature_does_not_compile(tmp_path: Path) -> None:
    def compiles(parameters: str) -> bool:
        source = f'#include "abi/abi.h"\nENTRENAR_API int entrenar_adapted({parameters}) {{ return 0; }}\n'
        command = ["c++", "-std=c++17", "-fsyntax-only", "-I", str(CSRC), "-x", "c++", "-"]
        return subprocess.run(command, input=source.encode(), capture_output=True).returncode == 0

    assert compiles("const entrenar::GroupView*, int")
    assert not compiles("const entrenar::GroupView*, int, int")
