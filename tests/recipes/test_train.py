"""A whole run: resumed = straight, bit for bit; somebody else's directory is left alone."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from entrenar.core.errors import InputError, StoppedError
from entrenar.core.run_log import read_metrics
from entrenar.files.peft import CONFIG_NAME, WEIGHTS_NAME
from entrenar.opening import compute
from entrenar.recipes.train import train
from entrenar.training.state import StepReport

MakeConfig = Callable[..., Path]
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss")


def numbers(run_dir: str) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{key: row[key] for key in NUMBERS if key in row} for row in rows]


def stop_after(step: int, number: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            signal.raise_signal(number)

    return on_step


def test_packing_changes_the_rows_before_the_model_not_the_run(make_config: MakeConfig) -> None:
    """Rows of 120 tokens hold two or three documents; without dropout, whose draws follow the layout."""
    changes = {"lora.dropout": 0.0, "data.max_length": 120}
    said: list[str] = []
    packed = train(make_config("packed", **changes), say=said.append)
    padded = train(make_config("padded", **changes, **{"data.packing": False}))
    assert not [line for line in said if "packing" in line]
    for one, other in zip(numbers(packed.run_dir), numbers(padded.run_dir), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other = (load_file(Path(run.adapter) / WEIGHTS_NAME) for run in (packed, padded))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_mixes_documents_is_trained_without_packing(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = BloomConfig(vocab_size=len(tiny_tokenizer), hidden_size=64, n_layer=1, n_head=4, initializer_range=0.1)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tiny_tokenizer.save_pretrained(tmp_path / "bloom")
    said: list[str] = []
    changes = {"model.path": str(tmp_path / "bloom"), "lora.dropout": 0.0}
    asked = train(make_config("asked", **changes), say=said.append)
    padded = train(make_config("padded", **changes, **{"data.packing": False}))
    (line,) = [line for line in said if "packing" in line]
    assert line == "no packing: BloomForCausalLM mixes documents that share a row, so each gets a row of its own"
    assert numbers(asked.run_dir) == numbers(padded.run_dir)


@pytest.mark.parametrize(("native", "count"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_float32_for_want_of_bfloat16_is_said(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, native: torch.dtype, count: int
) -> None:
    monkeypatch.setattr(compute, "native_dtype", lambda _: native)
    said: list[str] = []
    train(make_config(**{"model.dtype": "auto"}), say=said.append)
    assert said.count("computing in float32: this machine has no native bfloat16") == count


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_stopped_run_goes_on_to_the_same_numbers_bit_for_bit(make_config: MakeConfig, step: int, number: int) -> None:
    straight = train(make_config("straight"))
    broken = make_config("broken")
    with pytest.raises(StoppedError, match=f"after step {step} of 6"):
        train(broken, on_step=stop_after(step, number))
    resumed = train(broken)
    assert resumed.resumed_from_step == step
    one, other = (Path(result.adapter) / WEIGHTS_NAME for result in (straight, resumed))
    assert one.read_bytes() == other.read_bytes()
    assert numbers(straight.run_dir) == numbers(resumed.run_dir)


def test_a_killed_run_goes_on_from_its_last_checkpoint(make_config: MakeConfig) -> None:
    straight, broken = train(make_config("straight")), make_config("broken")

    def die(report: StepReport) -> None:
        if report.step == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(broken, on_step=die)
    resumed = train(broken)
    assert resumed.resumed_from_step == 4
    assert numbers(straight.run_dir) == numbers(resumed.run_dir)


def test_a_run_leaves_config_metrics_checkpoints_and_adapter(make_config: MakeConfig) -> None:
    result = train(make_config(), {"optimizer.lr": 5e-3, "lora.targets": ["q_proj", "down_proj"]})
    run = Path(result.run_dir)
    names = {"config.yaml", "metrics.jsonl", "adapter", "checkpoints", "result.json"}
    assert {path.name for path in run.iterdir()} == names
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-2", "step-4", "best-6"}
    assert "lr: 0.005" in (run / "config.yaml").read_text()
    adapter = json.loads((run / "adapter" / CONFIG_NAME).read_text())
    assert adapter["target_modules"] == ["down_proj", "q_proj"]
    assert len(load_file(run / "adapter" / WEIGHTS_NAME)) == 2 * 2 * 2


def test_a_finished_run_is_reported_not_repeated(make_config: MakeConfig) -> None:
    config, said, reports = make_config(), [], []
    first = train(config)
    assert train(config, say=said.append, on_step=reports.append) == first
    assert "finished" in said[0]
    assert not reports


def test_a_directory_with_another_run_is_refused_and_untouched(make_config: MakeConfig) -> None:
    result = train(make_config())
    before = {path: path.read_bytes() for path in Path(result.run_dir).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"another run, which differs in lora\.rank, optimizer\.lr"):
        train(make_config(**{"lora.rank": 2, "optimizer.lr": 1e-3}))
    assert before == {path: path.read_bytes() for path in Path(result.run_dir).rglob("*") if path.is_file()}


def test_a_directory_that_is_no_run_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a run of entrenar"):
        train(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora.rank": 65, "lora.init": "pissa"}, r"self_attn\.q_proj: rank 65 is above that of its weight"),
        (
            {"lora.targets": ["qq_proj"]},
            r"'qq_proj' matches no linear layer, embedding or experts: the model has .*q_proj",
        ),
        ({"data.max_length": 20}, r"train\.jsonl:1: the row has \d+ tokens, data\.max_length is 20"),
        ({"data.train": "nowhere.jsonl"}, r"nowhere\.jsonl does not exist"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        train(make_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_few_bad_rows_are_noted_beside_the_run(make_config: MakeConfig, tiny_data: Path, tmp_path: Path) -> None:
    rows = tiny_data.read_text(encoding="utf-8") * 5
    data = tmp_path / "rows.jsonl"
    data.write_text(rows + "not json\n", encoding="utf-8")
    said: list[str] = []
    result = train(make_config(**{"data.train": str(data)}), say=said.append)
    (rejected,) = (Path(result.run_dir) / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["line"] == 121
    assert "1 rejected" in said[0]


def test_memory_changes_no_bit_and_the_micro_batch_only_the_order_of_sums(make_config: MakeConfig) -> None:
    """At one micro-batch, what layers keep and compute again is the same to the last bit; another adds the same
    gradients up in another order, which AdamW's first steps, of the size of lr whatever the gradient, enlarge."""
    changes = {"lora.dropout": 0.0, "training.max_steps": 3}
    runs = [
        train(
            make_config(f"run-{rows}-{memory}", **changes, **{"training.micro_batch": rows, "training.memory": memory})
        )
        for rows, memory in ((8, "auto"), (8, "min"), (3, "auto"))
    ]
    one, lean, other = (load_file(Path(run.adapter) / WEIGHTS_NAME) for run in runs)
    assert all(torch.equal(one[name], lean[name]) for name in one)
    assert numbers(runs[0].run_dir) == numbers(runs[1].run_dir)
    for first, second in zip(numbers(runs[0].run_dir), numbers(runs[2].run_dir), strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
