"""The command from outside: instant help, exit codes, one sentence for every mistake, never a traceback."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from entrenar.cli.main import main

VERBS = ("init", "check", "train", "eval", "generate", "export", "merge", "inspect")


def entrenar(*arguments: object, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "entrenar", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, **options)  # pyright: ignore


def assert_refused(result: subprocess.CompletedProcess[str], sentence: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert re.search(sentence, result.stderr), result.stderr


@pytest.fixture
def config(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """config(text appended) → path; sections may be replaced by keyword."""

    def make(**sections: object) -> Path:
        values = {
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_model_dir)},
            "data": {"train": str(tiny_data)},
            "training": {"max_steps": 2},
            **sections,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return make


def test_help_names_every_verb_and_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom entrenar.cli.main import main\nsys.argv = ['entrenar', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'pydantic', 'numpy'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"  {verb}" in result.stdout for verb in VERBS)


def test_the_whole_job_by_command(
    config: Callable[..., Path], tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = config()
    checked = entrenar("check", path)
    assert checked.returncode == 0, checked.stderr
    assert re.search(r"base\s+[\d,]+ bytes", checked.stdout)
    assert '»{"do"' in checked.stdout
    assert not (tmp_path / "run").exists()
    trained = entrenar("train", path, "optimizer.lr=1e-3")
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"step 2/2  loss \d+\.\d+  \d+ tok/s .* left", trained.stdout)
    adapter = tmp_path / "run" / "adapter"
    measured = entrenar("eval", tiny_model_dir, "--adapter", adapter, "--data", tiny_data)
    assert re.search(r"exact match  \d+\.\d%", measured.stdout), measured.stderr
    exported = entrenar("export", tiny_model_dir, "--adapter", adapter, "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert exported.returncode == 0, exported.stderr
    inspected = entrenar("inspect", tmp_path / "m.gguf")
    assert "blk.0.attn_q.weight" in inspected.stdout
    answered = entrenar("generate", tmp_path / "m.gguf", "--prompt", "Please", "--max-new-tokens", 3)
    assert answered.returncode == 0, answered.stderr


def test_init_writes_a_config_that_check_understands(tmp_path: Path, tiny_model_dir: Path, tiny_data: Path) -> None:
    assert entrenar("init", "my.yaml", cwd=tmp_path).returncode == 0
    checked = entrenar("check", "my.yaml", f"model.path={tiny_model_dir}", f"data.train={tiny_data}", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert_refused(entrenar("init", "my.yaml", cwd=tmp_path), "my.yaml already exists")


def test_every_mistake_in_a_config_is_told_at_once_with_its_line(config: Callable[..., Path]) -> None:
    path = config(lora={"rnak": 8, "alpha": "much"}, optimiser={"lr": 1})
    result = entrenar("train", path)
    text = path.read_text(encoding="utf-8").splitlines()
    line = next(number for number, content in enumerate(text, start=1) if "rnak" in content)
    assert_refused(result, rf"config\.yaml:{line}: unknown key 'lora\.rnak': did you mean 'rank'\?")
    assert_refused(result, r"'lora\.alpha' is 'much' but input should be a valid number")
    assert_refused(result, r"unknown key 'optimiser': did you mean 'optimizer'\?")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"rows\.jsonl is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"rows\.jsonl:2: not JSON"),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', r"rows\.jsonl:1: no assistant turn"),
        ('{"question": "a"}\n', r"rows\.jsonl:1: a row with the keys question: rows have messages"),
        (None, r"rows\.jsonl does not exist"),
    ],
)
def test_bad_data_is_one_sentence(
    config: Callable[..., Path], tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    assert_refused(entrenar("train", config(data={"train": str(tmp_path / "rows.jsonl")})), sentence)
    assert not (tmp_path / "run").exists()


def test_broken_models_are_one_sentence(config: Callable[..., Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    gguf = tmp_path / "cut.gguf"
    entrenar("export", tiny_model_dir, "--to", "gguf", "-o", gguf)
    gguf.write_bytes(gguf.read_bytes()[:-1000])
    assert_refused(entrenar("train", config(model={"path": str(gguf)})), r"cut\.gguf is not a valid GGUF file: .*past")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(entrenar("train", config(model={"path": str(broken)})), "not a complete safetensors file")
    weights.write_bytes((tiny_model_dir / weights.name).read_bytes())
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "model_type": "llamma"}))
    assert_refused(entrenar("train", config(model={"path": str(broken)})), "is not a model that transformers .* knows")
    assert_refused(entrenar("train", config(model={"path": "no/such/model"})), r"is not a directory|does not exist")
    assert not (tmp_path / "run").exists()


def test_usage_errors_exit_with_two() -> None:
    assert_refused(entrenar("trian"), "No such command")
    assert_refused(entrenar("train"), "Missing argument")
    assert_refused(entrenar("train", "a.yaml", "lr"), r"write it as section\.key=value")
    assert_refused(entrenar("inspect", "nowhere"), "nowhere does not exist")


def test_merging_by_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    models = [{"model": str(tiny_model_dir), "parameters": {"weight": 1}}]
    values = {"merge_method": "ties", "base_model": str(tiny_model_dir), "models": models}
    path.write_text(yaml.safe_dump(values | {"models": [{**models[0], "model": f"{tiny_model_dir}/."}]}))
    planned = entrenar("merge", path, tmp_path / "out", "--plan")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"ties: \d+ tensors from .* into .*; nothing was written", planned.stdout)
    assert not (tmp_path / "out").exists()
    merged = entrenar("merge", path, tmp_path / "out")
    assert merged.returncode == 0, merged.stderr
    assert "is equal to the base: it adds nothing" in merged.stdout
    path.write_text(yaml.safe_dump(values | {"merge_methd": 1}))
    assert_refused(entrenar("merge", path, tmp_path / "b"), r"unknown key 'merge_methd': did you mean 'merge_method'\?")


def test_a_full_disk_fails_with_one_and_leaves_nothing_half_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    limit = 100_000
    full = entrenar(
        "export", tiny_model_dir, "--to", "gguf", "-o", tmp_path / "m.gguf",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert_refused(full, r"no space left while writing .*m\.gguf", code=1)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_loading_is_one_sentence_and_exit_code_1(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("entrenar.recipes.train.train", interrupted)
    monkeypatch.setattr(sys, "argv", ["entrenar", "train", str(config())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_an_override_written_as_an_option_is_taken(config: Callable[..., Path]) -> None:
    result = entrenar("train", config(), "--optimizer.lr=nothing")
    assert_refused(result, r"override: 'optimizer\.lr' is 'nothing' but")
