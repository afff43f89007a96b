"""The directory of a run: who may write, what ends it, what its first start fixes, and places that take nothing."""

import datetime
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from entrenar.core.atomic import output_lock
from entrenar.core.config import load_config
from entrenar.core.errors import EntrenarError, InputError, StoppedError
from entrenar.recipes import train as train_module
from entrenar.recipes.config import RunConfig
from entrenar.recipes.run_directory import locked, open_run_directory
from entrenar.recipes.train import train
from entrenar.training.state import StepReport

MakeConfig = Callable[..., Path]
SHORT = {"training.max_steps": 2, "lora.targets": ["q_proj"], "checkpoint.every_steps": 1}


def die(report: StepReport) -> None:
    if report.step == 2:
        raise MemoryError


def test_a_run_without_its_result_is_finished_and_the_result_is_made_again(make_config: MakeConfig) -> None:
    path = make_config(**SHORT)
    first = train(path)
    result = Path(first.run_dir) / "result.json"
    for damage in (result.unlink, lambda: result.write_text("{}"), lambda: result.write_text('{"steps": "two"')):
        damage()
        said: list[str] = []
        again = train(path, say=said.append)
        told = ("run_dir", "adapter", "steps", "tokens", "train_loss", "eval_loss")
        assert [getattr(again, name) for name in told] == [getattr(first, name) for name in told]
        assert "finished" in said[0]
        assert "made again from metrics.jsonl" in said[1]
        assert train(path) == again


def test_a_finished_run_that_tells_nothing_of_itself_is_one_sentence(make_config: MakeConfig) -> None:
    path = make_config(**SHORT)
    run = Path(train(path).run_dir)
    (run / "result.json").unlink()
    for text in ("", "[]\n", '{"step": 1}\n', '{"step": 1, "loss": [], "tokens": {}}\n'):
        (run / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"neither result\.json nor metrics\.jsonl"):
            train(path)


def test_a_finished_run_that_was_moved_tells_where_it_is(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(**SHORT))
    shutil.move(first.run_dir, tmp_path / "moved")
    there = train(make_config("moved", **SHORT))
    assert there == replace(first, run_dir=str(tmp_path / "moved"), adapter=str(tmp_path / "moved" / "adapter"))


def test_a_start_that_was_killed_leaves_a_free_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp-2").write_text("output")
    assert open_run_directory(load_config(RunConfig, make_config())).checkpoint is None
    train(make_config(**SHORT))
    assert not list((tmp_path / "run").glob(".*"))


def test_what_a_killed_process_left_is_swept_and_foreign_files_stay(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        train(make_config(**SHORT), on_step=die)
    run = tmp_path / "run"
    for name in (".best-6.tmp-2", ".step-1.tmp-0badcafe"):
        (run / "checkpoints" / name).mkdir()
    (run / ".notes.tmp-1").write_text("mine")
    train(make_config(**SHORT))
    assert [path.name for path in run.rglob(".*")] == [".notes.tmp-1"]


def test_a_second_process_is_told_before_any_work(make_config: MakeConfig, tmp_path: Path) -> None:
    with output_lock(tmp_path / "run"), pytest.raises(InputError, match="another process is writing"):
        train(make_config())
    assert not (tmp_path / "run").exists()


def test_the_lock_lies_inside_where_nothing_can_be_made_beside(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a directory that is mounted; root may write everywhere, so the answer is stubbed."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    config = load_config(RunConfig, make_config())
    with locked(config):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".config.yaml.lock"]
        assert open_run_directory(config).checkpoint is None
        with pytest.raises(InputError, match="another process is writing"), locked(config):
            pass
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("output", ["/proc/x", "{data}/below", "a\0b", "x" * 300, "/", "{tmp}/" + "y/" * 3000])
def test_an_impossible_place_is_one_sentence_before_any_work(
    make_config: MakeConfig, tiny_data: Path, tmp_path: Path, output: str
) -> None:
    place = output.format(data=tiny_data, tmp=tmp_path)
    with pytest.raises(InputError, match="choose another output") as caught:
        train(make_config(), {"output": place})
    assert "\n" not in str(caught.value)


def test_an_error_of_the_system_names_the_file(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "/disk/of/old")

    monkeypatch.setattr(train_module, "prepare_data", fail)
    with pytest.raises(EntrenarError, match="/disk/of/old: Input/output error; when that is mended") as caught:
        train(make_config())
    assert caught.value.exit_code == 1


def test_weights_that_changed_since_are_refused(make_config: MakeConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    path = make_config(**SHORT, **{"model.path": str(base)})
    with pytest.raises(MemoryError):
        train(path, on_step=die)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name] * 1.001
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="trained over another base"):
        train(path)
    shutil.copy(tiny_model_dir / "model.safetensors", base / "model.safetensors")
    assert train(path).resumed_from_step == 1


def test_a_dtype_left_open_stays_the_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config(**SHORT, **{"model.dtype": "auto"})
    with pytest.raises(MemoryError):
        train(path, on_step=die)
    written = load_config(RunConfig, tmp_path / "run" / "config.yaml").model.dtype
    assert written in ("float32", "bfloat16")
    other = "bfloat16" if written == "float32" else "float32"
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace(f"dtype: {written}", f"dtype: {other}")
    )
    assert open_run_directory(load_config(RunConfig, path)).config.model.dtype == other
    with pytest.raises(InputError, match=r"differs in model\.dtype"):
        open_run_directory(load_config(RunConfig, path, {"model.dtype": written}))


def test_a_date_that_a_template_writes_stays_the_runs(
    make_config: MakeConfig,
    tiny_model_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    template = "{{ strftime_now('%d %b %Y') }}" + str(tiny_tokenizer.chat_template)
    (base / "chat_template.jinja").write_text(template)
    path = make_config(**SHORT, **{"model.path": str(base)})
    said: list[str] = []
    with pytest.raises(MemoryError):
        train(path, on_step=die, say=said.append)
    today = datetime.date.today().isoformat()
    assert any(today in sentence for sentence in said)
    run = load_config(RunConfig, tmp_path / "run" / "config.yaml")
    assert run.data.date == today
    old = load_config(RunConfig, path, {"data.date": "2001-02-03"})
    with pytest.raises(InputError, match=r"differs in data\.date"):
        open_run_directory(old)
    assert open_run_directory(load_config(RunConfig, path)).config.data.date == today
    assert train(path).resumed_from_step == 1


def test_seconds_and_sessions_are_the_whole_runs(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_config(**SHORT)
    with pytest.raises(MemoryError):
        train(path, on_step=die)
    state = json.loads((Path(load_config(RunConfig, path).output) / "checkpoints/step-1/state.json").read_text())
    assert (state["sessions"], state["seconds"] > 0) == (1, True)
    result = train(path)
    assert result.sessions == 2
    assert result.seconds > state["seconds"]


def test_a_share_that_holds_out_no_row_is_refused(make_config: MakeConfig) -> None:
    changes = {"data.validation_fraction": 1e-6, "eval.patience": 2}
    with pytest.raises(InputError, match=r"validation_fraction 1e-06 of the 24 rows .* holds out none: raise it"):
        train(make_config(**changes))


def test_a_token_that_the_model_does_not_have_is_named_before_the_first_step(
    make_config: MakeConfig, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config, weights = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    size = len(tiny_tokenizer) - 60
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    cut = {name: t[:size].clone() if t.shape[0] == config["vocab_size"] else t for name, t in weights.items()}
    save_file(cut, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"train\.jsonl:\d+: the tokenizer makes token \d+ .* has {size} tokens"):
        train(make_config(**{"model.path": str(base)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints", "adapter", "result.json"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "file"])
def test_something_else_in_place_of_a_runs_file_is_no_traceback(
    make_config: MakeConfig, tmp_path: Path, name: str, kind: str
) -> None:
    """A stopped run whose files were replaced: it goes on, or says what is in the way."""
    path = make_config(**SHORT)
    with pytest.raises(MemoryError):
        train(path, on_step=die)
    target = tmp_path / "run" / name
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "directory": Path.mkdir, "file": lambda p: p.write_text("?")}[kind](target)
    try:
        train(path)
    except EntrenarError as error:
        assert "\n" not in str(error) or name == "config.yaml"


def test_max_steps_goes_beyond_the_epochs(make_config: MakeConfig) -> None:
    """As in transformers' Trainer, where it overrides num_train_epochs."""
    said: list[str] = []
    result = train(make_config(**SHORT), {"training.max_steps": 5, "training.epochs": 1}, say=said.append)
    assert result.steps == 5
    assert any("max_steps 5 goes beyond training.epochs 1" in sentence for sentence in said)


def test_a_run_is_stopped_in_an_evaluation(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's part of training/test_loop.py: the same command goes on, and ends as the straight run."""
    import signal

    from entrenar.objectives import supervised

    changes = {**SHORT, "data.packing": False, "training.micro_batch": 1}
    straight = train(make_config("straight", **changes))
    whole = supervised.target_loss

    def interrupted(model: torch.nn.Module, *rest: torch.Tensor) -> torch.Tensor:
        if not model.training:
            signal.raise_signal(signal.SIGINT)
        return whole(model, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(supervised, "target_loss", interrupted)
    with pytest.raises(StoppedError, match="after step 2 of 2"):
        train(make_config(**changes))
    monkeypatch.undo()
    resumed = train(make_config(**changes))
    one, other = (load_file(Path(run.adapter) / "adapter_model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (resumed.eval_loss, resumed.tokens) == (straight.eval_loss, straight.tokens)
