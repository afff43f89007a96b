"""Fifty steps of the quickstart: how far our losses are from float32's, beside how far the peer's are.

The same NF4 codes, the same first adapter, the same rows in the same order, three times: ours; transformers + peft +
bitsandbytes under bf16 autocast; and peft's LoRA in float32 on the dequantized base, which both of them approximate.

What is exact in bfloat16 is known to 2⁻⁹ of itself, and a step multiplies what the last one left, so no two bf16 runs
agree in their digits. The peer's own distance from float32 is therefore the yardstick of what bf16 costs: ours may be
at most as far, and the mean loss over the last ten steps at most 2% from float32's.

python benchmarks/loss_curves.py [--json FILE] [--only PART_OF_A_NAME]; without bf16 instructions the peer takes hours.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _timing import Row, arguments, leave_this_folder, report

import entrenar
from entrenar.core.config import load_config
from entrenar.data.batches import Batch, batch_rows, collate
from entrenar.lora.attach import attach_lora, trained_parameters
from entrenar.objectives.supervised import SUPERVISED
from entrenar.opening.source import open_source
from entrenar.optim.schedule import learning_rate_factor
from entrenar.recipes.config import RunConfig
from entrenar.recipes.train import prepare_data
from entrenar.training.learner import Learner
from entrenar.training.step import update

STEPS, LAST = 50, 10
ROOT = Path(__file__).parents[1]
Step = Callable[[Batch, float], float]  # batch, learning rate → mean loss


def ours(checkpoint: Path, adapter: Path) -> Step:
    """Our step over the NF4 base."""
    model: Any = entrenar.load(str(checkpoint), "nf4")[0]
    entrenar.load_adapter(model, adapter)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1.0, weight_decay=0.0)
    model.train()
    learner = Learner(model, optimizer, SUPERVISED)
    return lambda batch, lr: update(learner, [batch], lr, 1.0).loss


def theirs(base: Any, adapter: Path, autocast: bool) -> Step:
    """What a user of peft writes, over any base of transformers."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)

    def step(batch: Batch, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        labels = torch.where(batch.targets, batch.ids, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch.ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def bitsandbytes_base(checkpoint: Path) -> Any:
    """The checkpoint in NF4, by the peer."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=packing, dtype=torch.bfloat16)


def float32_base(checkpoint: Path, adapter: Path, folder: Path) -> Any:
    """The numbers of the NF4 base in float32; the first adapter's B is zero, so that fusing it changes nothing."""
    from transformers import AutoModelForCausalLM

    entrenar.export(str(checkpoint), folder, adapter=str(adapter), type="f32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def first_adapter(checkpoint: Path, config: RunConfig, directory: Path) -> None:
    """The adapter that all three start from."""
    model: Any = entrenar.load(str(checkpoint), "nf4")[0]
    torch.manual_seed(config.training.seed)
    attach_lora(model, config.lora.rank, config.lora.alpha)
    entrenar.save_adapter(model, directory)


def curve(step: Step, batches: Sequence[Batch], config: RunConfig) -> torch.Tensor:
    """The losses (STEPS,) float64, in nats per target token."""
    warmup, schedule = config.optimizer.warmup_steps, config.optimizer.schedule
    rates = [config.optimizer.lr * learning_rate_factor(n, STEPS, warmup, schedule) for n in range(STEPS)]
    return torch.tensor([step(batch, rate) for batch, rate in zip(batches, rates, strict=True)], dtype=torch.float64)


def curves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ours, the peer's, float32's."""
    leave_this_folder()
    torch.set_num_threads(2)
    config = load_config(RunConfig, ROOT / "examples" / "quickstart.yaml", {})
    source = open_source(config.model.path)
    rows = prepare_data(config, source.tokenizer).train
    chosen = [batch_rows(len(rows), config.training.batch_size, config.training.seed, n) for n in range(STEPS)]
    batches = [collate([[rows.examples[row]] for row in each], 0) for each in chosen]
    with TemporaryDirectory() as folder:
        checkpoint, adapter, dequantized = (Path(folder) / name for name in ("bf16", "adapter", "f32"))
        entrenar.export(config.model.path, checkpoint, type="bf16")
        first_adapter(checkpoint, config, adapter)
        makers = (
            lambda: ours(checkpoint, adapter),
            lambda: theirs(bitsandbytes_base(checkpoint), adapter, autocast=True),
            lambda: theirs(float32_base(checkpoint, adapter, dequantized), adapter, autocast=False),
        )
        first, second, third = (curve(make(), batches, config) for make in makers)
    return first, second, third


def main() -> None:
    """Train three times, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    mine, peer, exact = curves()
    distances = [(each - exact).abs().mean().item() for each in (mine, peer)]
    ends = [each[-LAST:].mean().item() for each in (mine, peer, exact)]
    for name, each in (("ours", mine), ("peer", peer), ("float32", exact)):
        print(f"{name:8}", *(f"{loss:.4f}" for loss in each[[0, 1, 2, 4, 9, 19, 29, 39, 49]].tolist()))
    table = [
        Row(
            metric="loss_curve_distance", shape=f"{STEPS} steps", unit="nats", ours=distances[0], peer=distances[1],
            peer_name="transformers + peft + bitsandbytes", ratio=distances[1] / distances[0], limit=1.0,
        ),
        Row(
            metric="loss_curve_end", shape=f"last {LAST}", unit="nats", ours=ends[0], peer=ends[2],
            peer_name="float32", ratio=0.02 / max(abs(ends[0] / ends[2] - 1), 1e-9), limit=1.0,
        ),
    ]  # fmt: skip
    report(table, options.json)


if __name__ == "__main__":
    main()
