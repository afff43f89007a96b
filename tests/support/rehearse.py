"""What a user does after `pip install entrenar`, with a tiny model: `python -m tests.support.rehearse PATH` in a clean
environment, where PATH says which kernels have to serve: `native`, or `reference` for an install without a compiler.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
import yaml

import entrenar
from entrenar import native
from tests.support import tiny_llama


def run(*arguments: object, says: str = "") -> str:
    """What a command line writes to standard output; it has to succeed, and to say `says` on standard error."""
    command = [str(Path(sysconfig.get_path("scripts")) / "entrenar"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert says in result.stderr
    return result.stdout


def main(kernels: str) -> None:
    """Version, three steps, and a quantized model in both of its formats."""
    site_packages = Path(sysconfig.get_path("purelib"))
    assert Path(entrenar.__file__).is_relative_to(site_packages), f"not the installed package: {entrenar.__file__}"
    assert native.available() == (kernels == "native")
    if kernels == "native":
        library = native.file()
        assert library is not None
        assert library.is_relative_to(site_packages / "entrenar" / "native"), library
    versions = f"entrenar {entrenar.__version__}, kernels: {native.path()}, torch {torch.__version__}\n"
    assert run("--version", says="" if kernels == "native" else "the native kernels are not built") == versions
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = tiny_llama.make_tokenizer()
        model = tiny_llama.save_model(root / "model", tokenizer)
        config = root / "run.yaml"
        values = {
            "output": str(root / "run"), "model": {"path": str(model), "quantize": {"format": "nf4"}},
            "data": {"train": str(tiny_llama.write_rows(root / "train.jsonl"))},
            "lora": {"rank": 4, "alpha": 8}, "training": {"max_steps": 3, "batch_size": 4},
        }  # fmt: skip
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        run("train", config)
        assert json.loads((root / "run" / "result.json").read_text(encoding="utf-8"))["steps"] == 3
        adapter = ("--adapter", root / "run" / "adapter")
        run("export", model, "-o", root / "nf4", "--type", "nf4", *adapter)
        run("export", model, "-o", root / "model.gguf", "--to", "gguf", "--type", "q8_0", *adapter)
        assert "Q8_0" in run("inspect", root / "model.gguf").upper()
    sys.stdout.write(f"rehearsed with the {native.path()} kernels\n")


if __name__ == "__main__":
    main(sys.argv[1])
