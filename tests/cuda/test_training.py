"""The same path on a GPU: the CPU's numbers, a plan that holds, and everything a run leaves usable."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.core.errors import StoppedError
from entrenar.core.run_log import read_metrics
from entrenar.evaluation.fidelity import ExportStep
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.opening.load import load
from entrenar.recipes.evaluate import evaluate
from entrenar.recipes.export import export
from entrenar.recipes.train import TrainResult, train
from entrenar.training.state import StepReport

pytestmark = pytest.mark.cuda
MakeConfig = Callable[..., Path]
_RUN = "import sys, entrenar; entrenar.train(sys.argv[1])"


def _losses(result: TrainResult) -> list[float]:
    rows: list[Any] = list(read_metrics(Path(result.run_dir) / "metrics.jsonl"))
    return [row["loss"] for row in rows]


def _both(make_config: MakeConfig, **changes: object) -> list[TrainResult]:
    changes = {"lora.dropout": 0.0, **changes}
    return [train(make_config(device, **changes, **{"model.device": device})) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("changes", [
    {}, {"model.quantize": "none"}, {"model.quantize": "int8"}, {"model.double_quant": True}, {"lora.dora": True},
    {"lora.init": "pissa"}, {"lora.init": "loftq_2"}, {"lora.modules_to_save": ["embed_tokens"]},
    {"training.memory": "min"}, {"lora.targets": ["q_proj", "embed_tokens"], "model.quantize": "none"},
], ids=str)  # fmt: skip
def test_a_run_has_the_cpus_numbers(make_config: MakeConfig, changes: dict[str, object]) -> None:
    """float32 on both; products are summed in another order, and every step multiplies the difference."""
    here, there = _both(make_config, **changes)
    assert _losses(there) == pytest.approx(_losses(here), rel=2e-3)
    one, other = (load_file(Path(result.adapter) / WEIGHTS_NAME) for result in (here, there))
    assert one.keys() == other.keys()
    first = [name for name in one if "lora_A" in name]
    assert all((one[name] - other[name]).norm() < 0.05 * one[name].norm() for name in first)


def test_bfloat16_is_as_near_as_it_is_on_the_cpu(make_config: MakeConfig) -> None:
    here, there = _both(make_config, **{"model.dtype": "bfloat16"})
    assert _losses(there) == pytest.approx(_losses(here), rel=0.02)


def test_a_stopped_run_goes_on_to_the_same_numbers(make_config: MakeConfig) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    straight = train(make_config("straight"))
    config = make_config("stopped")
    with pytest.raises(StoppedError):
        train(config, on_step=stop)
    resumed = train(config)
    assert resumed.resumed_from_step == 3
    assert _losses(resumed) == pytest.approx(_losses(straight), rel=1e-4)


def test_modules_get_the_forwards_they_get_on_a_cpu(tiny_model_dir: Path) -> None:
    """Decoder layers, too, of other parts."""
    model, _ = load(str(tiny_model_dir), "nf4")
    assert model.device.type == "cuda"
    assert model.dtype is torch.bfloat16
    replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    parts = 5 * ["LlamaRMSNorm"] + 2 * ["LlamaMLP"] + 2 * ["LlamaAttention"]
    assert sorted(replaced) == sorted([*parts, *2 * ["LlamaDecoderLayer"]])


@pytest.mark.parametrize("policy", ["auto", "min"])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_plan_is_within_15_percent_of_the_peak(
    make_config: MakeConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, policy: str, quantize: str
) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    del model
    rows = [json.dumps({"text": f"switch on the lamp {number} " * 200}) for number in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = make_config(
        **{
            "model.path": str(base), "model.dtype": "auto", "model.quantize": quantize,
            "data.train": str(tmp_path / "train.jsonl"), "data.validation_fraction": 0.0, "data.max_length": 512,
            "data.too_long": "truncate", "lora.dropout": 0.0, "training.memory": policy, "training.micro_batch": 4,
            "training.batch_size": 4, "training.max_steps": 3,
        }
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", _RUN, str(path)], check=True, timeout=240)
    result = json.loads((path.parent / "run" / "result.json").read_text())
    assert result["planned_memory_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.15)


def test_what_a_run_leaves_is_evaluated_and_exported(
    make_config: MakeConfig, tmp_path: Path, tiny_model_dir: Path, tiny_data: Path
) -> None:
    result = train(make_config(**{"lora.dropout": 0.0}))
    base, model = str(tmp_path / "base.gguf"), str(tiny_model_dir)
    measured = evaluate(model, tiny_data, adapter=result.adapter)
    assert measured.loss < 5  # of 6 before training
    steps: list[ExportStep] = []
    text = tmp_path / "text.txt"
    text.write_text("switch on the lamp and check the door " * 40)
    export(
        model, base, adapter=result.adapter, to="gguf", type="q8_0", on_verified=steps.extend, verify_on=text,
    )  # fmt: skip
    assert [step.step for step in steps] == ["live", "fused", "quantized"]
    assert steps[1].kl < 1e-4
    assert steps[2].kl < 0.05
    kept = evaluate(base, tiny_data)
    assert kept.loss == pytest.approx(measured.loss, rel=0.05)
