"""What an export is asked for is checked before torch is imported; the output's name and the options fit each other."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entrenar.core.errors import InputError
from entrenar.gguf.types import FILE_TYPES
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED
from entrenar.ops.gguf.blocks import IMPORTANCE_TYPES
from entrenar.quant.registry import FORMATS
from entrenar.recipes.export_request import EXCLUSIVE, TYPES, Exclusive, ExportRequest
from entrenar.recipes.inputs import QUANTIZE, check_model


def request(output: str, **options: Any) -> ExportRequest:
    return ExportRequest(model="org/model", output=Path(output), **options)


@pytest.mark.parametrize(
    ("output", "options", "kind", "type"),
    [
        ("new.gguf", {}, "gguf", "f16"),
        ("new", {}, "safetensors", "bf16"),
        ("new.v2", {"type": "F32"}, "safetensors", "f32"),
        ("new.gguf", {"type": "Q4_K_M"}, "gguf", "q4_k_m"),
        ("new.gguf", {"to": "GGUF", "type": "q8_0"}, "gguf", "q8_0"),
    ],
)
def test_the_suffix_decides_and_capitals_are_taken(
    tmp_path: Path, output: str, options: dict[str, str], kind: str, type: str
) -> None:
    asked = request(str(tmp_path / output), **options)
    assert (asked.kind, asked.checked_type()) == (kind, type)


@pytest.mark.parametrize(
    ("output", "options", "sentence"),
    [
        ("new", {"to": "gguf"}, r"new does not end in \.gguf, by which tools know such a file: write .*new\.gguf"),
        ("new.GGUF", {}, r"does not end in \.gguf"),
        ("new", {"to": "gguf-adapter", "adapter": "."}, r"does not end in \.gguf"),
        ("new.gguf", {"to": "safetensors"}, "is the name of a GGUF, but safetensors is a directory"),
        ("new", {"to": "ggfu"}, "cannot export to 'ggfu': choose safetensors or gguf or gguf-adapter .did you mean"),
        ("new.gguf", {"type": "q4km"}, "gguf has no type 'q4km' here: choose f16, .*did you mean 'q4_k_m'"),
        ("new", {"quantize": "nf5"}, "there is no base format 'nf5': choose nf4"),
        ("new", {"base": "new"}, "there is no base 'new': choose dequantized or original"),
        ("new", {"model": "./nowhere"}, "model path './nowhere' does not exist"),
        ("new", {"model": "nowhere.gguf"}, "GGUF file nowhere.gguf does not exist"),
        ("new", {"model": "", "adapter": None}, "model path '' does not exist"),
        ("new", {"model": "x" * 300}, "does not exist"),
        ("new", {"adapter": "nowhere"}, "adapter nowhere does not exist"),
        ("new", {"text": "nowhere.jsonl"}, "data file nowhere.jsonl does not exist"),
        ("new.gguf", {"verify_on": "nowhere.txt"}, "cannot read the text nowhere.txt to verify on"),
        ("new.safetensors", {}, "is the name of one file, but a model is a directory"),
        ("taken", {}, "taken already exists"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, output: str, options: dict[str, Any], sentence: str) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=sentence):
        ExportRequest(**{"model": "org/model", "output": tmp_path / output, **options}).checked_type()
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("row", EXCLUSIVE, ids=lambda row: row.kind)
@pytest.mark.parametrize("kind", TYPES)
def test_an_option_of_one_kind_is_refused_by_the_others(tmp_path: Path, row: Exclusive, kind: str) -> None:
    for option in row.options:
        asked = request(str(tmp_path / "new.gguf"), to=kind, adapter=".", **{option: True})
        if kind != row.kind:
            with pytest.raises(InputError) as refused:
                asked.checked_type()
            assert str(refused.value) == row.refusal.format(kind=kind)


def test_the_names_are_those_of_what_writes_them() -> None:
    assert TYPES["gguf"] == tuple(FILE_TYPES)
    assert {name for name in TYPES["gguf"] if "_k" in name} == {
        name for name, row in FILE_TYPES.items() if row.most in IMPORTANCE_TYPES
    }
    assert {*FORMATS, AS_STORED, UNQUANTIZED} >= set(QUANTIZE)


def test_a_named_pipe_is_not_waited_at(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="is a named pipe, not a file"):
        check_model(str(tmp_path / "m.gguf"))


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: x\nmodel: {path: ./no-model}\ndata: {train: rows.jsonl}\n")
    (tmp_path / "d.yaml").write_text("output: x\nmodel: {path: org/model}\ndata: {train: rows.jsonl}\n")
    lines = (
        "export m -o x.gguf --to onnx", "export m -o x.gguf --type q9", "export ./m -o x", "export m -o x --adapter no",
        "export m -o x --quantize no", "export m -o x --verify", "eval ./m --data rows", "eval m --data rows",
        "generate ./m -p a", "generate m -p a --adapter no", "inspect nowhere", "train nowhere.yaml", "train c.yaml",
        "check nowhere.yaml", "check c.yaml", "check d.yaml", "train d.yaml", "train d.yaml lr", "init c.yaml", "trian",
    )  # fmt: skip
    code = (
        "import sys\nfrom entrenar.cli.app import run\nfrom entrenar.core.errors import InputError\n"
        "for line in sys.argv[1:]:\n"
        "    try: run(line.split())\n"
        "    except InputError: pass\n"
        "    else: sys.exit(f'{line} passed')\n"
        "    if {'torch', 'transformers'} & sys.modules.keys(): sys.exit(f'{line} imported torch')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *lines], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
