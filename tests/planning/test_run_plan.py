"""The memory plan of a run: close to what the run takes, followed by it, and refused where it cannot be."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.core.run_log import read_metrics
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.planning import run_plan
from entrenar.recipes.check import check
from entrenar.recipes.config import TrainingSection
from entrenar.recipes.train import train
from entrenar.training.state import StepReport

MakeConfig = Callable[..., Path]
_RUN = "import sys, torch, entrenar; torch.set_num_threads(1); entrenar.train(sys.argv[1])"


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model and data that make activations count beside the libraries."""
    directory = tmp_path_factory.mktemp("middling")
    config = LlamaConfig(
        vocab_size=4000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    rows = [json.dumps({"text": f"switch on the lamp {number} " * 40}) for number in range(12)]
    (directory / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return directory


@pytest.mark.parametrize("policy", ["auto", "min"])
def test_the_plan_is_within_15_percent_of_the_peak(make_config: MakeConfig, middling: Path, policy: str) -> None:
    """In a process of its own, whose memory nobody has used before."""
    config = make_config(
        **{
            "model.path": str(middling), "model.dtype": "auto", "data.train": str(middling / "train.jsonl"),
            "data.validation_fraction": 0.0, "data.max_length": 256, "data.too_long": "truncate", "lora.dropout": 0.0,
            "training.memory": policy, "training.micro_batch": 4, "training.batch_size": 4, "training.max_steps": 3,
        }
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", _RUN, str(config)], check=True, timeout=240)
    result = json.loads((config.parent / "run" / "result.json").read_text())
    assert result["planned_memory_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.15)


def test_a_run_that_saves_memory_has_the_same_numbers(make_config: MakeConfig) -> None:
    configs = [make_config(policy, **{"training.memory": policy}) for policy in ("auto", "min")]
    one, other = (load_file(Path(train(config).adapter) / WEIGHTS_NAME) for config in configs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    plans = [check(config).memory for config in configs]
    # This process holds more before the second one than before the first.
    assert plans[1].total - plans[1].fixed.libraries < plans[0].total - plans[0].fixed.libraries


def test_check_and_train_make_the_same_plan(make_config: MakeConfig) -> None:
    config = make_config(**{"training.micro_batch": "auto"})
    checked, said = check(config).memory, list[str]()
    train(config, say=said.append)
    (line,) = [line for line in said if line.startswith("memory:")]
    assert line.split(";")[1:] == checked.sentence().split(";")[1:]


def test_a_resumed_run_keeps_its_micro_batch_whatever_the_memory(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    straight = train(make_config("straight", **{"training.micro_batch": "auto"}))
    broken, said = make_config("broken", **{"training.micro_batch": "auto"}), list[str]()
    with pytest.raises(KeyboardInterrupt):
        train(broken, on_step=stop)
    monkeypatch.setattr(run_plan, "MAX_TOKENS", 1)  # a new run would now take one row at a time
    resumed = train(broken, say=said.append)
    assert resumed.resumed_from_step == 2
    assert not [line for line in said if "; 1 rows" in line]
    one, other = (Path(result.adapter) / WEIGHTS_NAME for result in (straight, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_fit_is_refused_before_anything_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    for bytes_allowed, sentence in ((1000, "alone take"), ("20MB", "needs about")):
        config = make_config(**{"training.memory": bytes_allowed})
        for run in (train, check):
            with pytest.raises(InputError, match=sentence):
                run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "count"), [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), (5000, 5000), ("800mb", 8 * 10**8)]
)
def test_sizes_are_read(given: str | int, count: int) -> None:
    assert TrainingSection(memory=given).memory == count  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", ["much", "6 TBB", "-3", 0, True, 1.5])
def test_other_sizes_are_refused(make_config: MakeConfig, given: object) -> None:
    with pytest.raises(InputError, match=r"training\.memory"):
        check(make_config(**{"training.memory": given}))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_500_steps_leak_nothing(make_config: MakeConfig, dtype: str) -> None:
    """A kept activation would be 100 kB a step; what the heap still settles after 250 steps may be 8 kB of one."""
    config = make_config(
        **{
            "model.dtype": dtype, "lora.dropout": 0.0, "data.validation_fraction": 0.0, "checkpoint.every_steps": 0,
            "training.epochs": 1000, "training.max_steps": 500,
        }
    )  # fmt: skip
    held = [row["memory_bytes"] for row in read_metrics(Path(train(config).run_dir) / "metrics.jsonl")]
    assert len(held) == 500
    assert max(held[450:]) - max(held[200:250]) < 2_000_000
