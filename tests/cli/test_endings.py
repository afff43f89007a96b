"""However a command ends, the user reads one sentence; what a file holds is shown on the terminal and not obeyed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import zeros

import entrenar
from entrenar import native

_HOSTILE = "\x1b[2J\x1b]0;x\x07\r\u202e\u200b"


def python(
    code: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.mark.parametrize(
    ("raised", "sentence", "code"),
    [
        ("KeyboardInterrupt", "error: stopped by Ctrl-C\n", 1),
        ("MemoryError", "error: out of memory: close other programs", 1),
        ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried')", "error: out of memory", 1),
        ("OSError(5, 'Input/output error', 'a/b')", "error: the system refused: Input/output error (a/b)", 1),
        ("OSError(24, 'Too many open files')", "error: the system refused: Too many open files", 1),
        (
            "UnicodeEncodeError('ascii', 'a\\xf1', 1, 2, 'x')",
            "error: 'a\xf1' has no form in ascii: set LC_ALL=C.UTF-8",
            1,
        ),
        ("RecursionError", "error: something nests too deep", 1),
        ("InputError('one\\x1b[2J\\ntwo')", "error: one\\x1b[2J\nerror: two\n", 2),
    ],
)
def test_whatever_is_raised_is_one_sentence(raised: str, sentence: str, code: int) -> None:
    result = python(
        "import sys; from entrenar.core.errors import InputError; from entrenar.cli import app, main\n"
        f"def run(_): raise {raised}\n"
        "app.run = run; main.main()"
    )
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(sentence)
    assert "Traceback" not in result.stderr


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    result = python(
        "from entrenar.cli import app, main\ndef run(_): raise RuntimeError('a bug')\napp.run = run; main.main()"
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_ctrl_c_while_everything_is_still_imported() -> None:
    result = python(
        "import sys; from entrenar.cli.main import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder()); main()"
    )
    assert (result.returncode, result.stderr) == (1, "error: stopped by Ctrl-C\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_takes_nothing_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "entrenar", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the system refused: No space left on device")
    assert result.stderr.count("\n") == 1


def test_help_and_version_have_their_usual_names() -> None:
    code = "import sys; from entrenar.cli.main import main; sys.argv[0] = 'entrenar'; main()"
    expected = f"entrenar {entrenar.__version__}, kernels: {native.path()}, torch {torch.__version__}\n"
    assert python(code, "--version").stdout == expected
    assert python(code, "export", "-h").stdout == python(code, "export", "--help").stdout
    assert "Usage: entrenar" in python(code).stdout
    wrong = python(code, "export", "x", "--tpye", "f16")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: No such option: --tpye")
    assert "see `entrenar export --help`" in wrong.stderr


def test_an_argument_that_is_no_text_is_one_sentence() -> None:
    code = "import sys; from entrenar.cli.main import main; sys.argv[1:] = ['generate', 'm', '-p', '\\udced']; main()"
    result = python(code)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the argument \\udced is not text")


def test_verbs_write_plain_characters_where_there_are_no_others_and_obey_no_file(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} {_HOSTILE}", "completion": f"ñ日 {_HOSTILE}{n}"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    values = {
        "output": f"{tmp_path}/run [red]", "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"train": "rows.jsonl"}, "training": {"max_steps": 1, "batch_size": 1},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    save_file({f"a{_HOSTILE}": zeros(2)}, tmp_path / "w.safetensors", {f"k{_HOSTILE}": f"v{_HOSTILE}" * 50})
    lines = ["check|c.yaml", "train|c.yaml", "inspect|w.safetensors", f"eval|{tiny_model_dir}|--data|one.jsonl"]
    code = (
        "import sys; from entrenar.core.terminal import plain_streams; from entrenar.cli.app import run\n"
        "plain_streams()\nfor line in sys.argv[1:]: assert run(line.split('|')) == 0\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    result = python(code, *lines, cwd=tmp_path, **plain)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert not {"\x1b", "\x07", "\r"} & set(result.stdout)
    assert ">>\\xf1\\u65e5 \\x1b[2J\\x1b]0;x\\x07\\r\\u202e\\u200b" in result.stdout  # a trained sample
    assert "run [red]" in result.stdout  # markup is text
    assert "a\\x1b[2J\\x1b]0;x\\x07\\r\\u202e\\u200b" in result.stdout  # a tensor's name
    assert "k\\x1b[2J" in result.stdout
