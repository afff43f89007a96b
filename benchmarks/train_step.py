"""A QLoRA training step against transformers + peft + bitsandbytes: speed, memory, packing, and the products alone.

Rank 16 on every linear layer, 2 × 512 tokens, every position supervised, AdamW and clipping included. The peer runs at
its best settings: bf16 autocast, with or without checkpointing, whichever is faster. Each side has a process of its
own, and they take turns.

python benchmarks/train_step.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME]
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _rows import row_lengths
from _timing import PAUSE, PeerProcess, Row, Work, arguments, leave_this_folder, report, seconds

THREADS, RANK, ALPHA = 2, 16, 32
BATCH, TOKENS = 2, 512
PEER = "transformers + peft + bitsandbytes"
ROWS_AT_A_TIME, PADDED_BATCH = 32, 8  # of the packing row: the sides take turns within one pass over the rows
Lengths = tuple[int, ...]


def ours(model_path: Path, lengths: Lengths | None, quantize: str = "nf4") -> Work:
    """Our step over the standard batch, or over rows of these lengths, packed."""
    import torch

    import entrenar
    from entrenar.data.batches import micro_batches
    from entrenar.data.encode import Example
    from entrenar.lora.attach import attach_lora
    from entrenar.optim.adamw import make_adamw
    from entrenar.training.step import update

    torch.set_num_threads(THREADS)
    model: Any = entrenar.load(str(model_path), quantize)[0]
    attach_lora(model, RANK, ALPHA)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_adamw(parameters, 1e-4, (0.9, 0.999), 1e-8, 0.0)
    generator = torch.Generator().manual_seed(0)

    def example(count: int) -> Example:
        ids = torch.randint(3, model.config.vocab_size, (count,), generator=generator).tolist()
        return Example(0, ids, [True] * count)

    batches = micro_batches([example(n) for n in lengths or (TOKENS,) * BATCH], BATCH, pad_id=0, pack_to=TOKENS)
    model.train()
    return lambda: update(model, optimizer, batches, 1e-4, 1.0)


def theirs(directory: Path, checkpointing: bool, lengths: Lengths | None) -> Work:
    """What a user of the peers writes; rows of these lengths are padded in batches of 8."""
    leave_this_folder()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=packing, dtype=torch.bfloat16)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapter).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def batch(counts: Lengths) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, model.config.vocab_size, (len(counts), max(counts)), generator=generator)
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}

    rows = lengths or (TOKENS,) * BATCH
    batches = [batch(rows[at : at + PADDED_BATCH]) for at in range(0, len(rows), PADDED_BATCH)]

    def step() -> None:
        optimizer.zero_grad()
        for inputs in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def bare_products(directory: Path) -> Callable[[], float]:
    """Seconds of torch's bf16 products of a step: forward and input gradient of every base weight and the head."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(THREADS)
    config = AutoConfig.from_pretrained(directory)
    width, wide, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    layers = config.num_hidden_layers
    shapes = {(width, width): 2, (keys, width): 2, (wide, width): 2, (width, wide): 1}
    counted = [(shape, count * layers) for shape, count in shapes.items()] + [((config.vocab_size, width), 1)]

    def products(rows: int, columns: int) -> Work:
        tokens = BATCH * TOKENS
        x, weight, grad = (torch.randn(s).bfloat16() for s in ((tokens, columns), (rows, columns), (tokens, rows)))
        y, dx = torch.empty_like(grad), torch.empty_like(x)

        def run() -> None:
            torch.mm(x, weight.t(), out=y)
            torch.mm(grad, weight, out=dx)

        return run

    works = [(products(*shape), count) for shape, count in counted]
    return lambda: sum(seconds(work) * count for work, count in works)


def make_model(name: str) -> Path:
    """The checkpoint; a function, so that the peer's process does not import entrenar."""
    from _models import LLAMA_1B, LLAMA_135M, random_checkpoint

    return random_checkpoint(f"llama-{name}", {"135m": LLAMA_135M, "1b": LLAMA_1B}[name])


@dataclass(frozen=True)
class Turns:
    """Median seconds of each side's turns, and each side's peak of anonymous memory."""

    ours: float
    peer: float
    products: float
    our_peak: int
    peer_peak: int


def take_turns(directory: Path, rounds: int) -> Turns:
    """Our step, the peer's faster one, and the bare products, one after the other."""
    import time

    with ExitStack() as stack:
        mine, theirs_plain, theirs_checkpointed = (
            stack.enter_context(PeerProcess(work)) for work in (ours, theirs, theirs)
        )
        candidates = [
            (theirs_plain, theirs_plain.prepare(directory, False, None)),
            (theirs_checkpointed, theirs_checkpointed.prepare(directory, True, None)),
        ]
        peer_process, peer = min(candidates, key=lambda each: each[1]())
        step, products = mine.prepare(directory, None), bare_products(directory)
        step()
        found: list[tuple[float, float, float]] = []
        with mine.peak_memory() as our_memory, peer_process.peak_memory() as peer_memory:
            for _ in range(rounds):
                turn = []
                for side in (step, peer, products):
                    time.sleep(PAUSE)
                    turn.append(side())
                found.append((turn[0], turn[1], turn[2]))
        medians = [statistics.median(turn[side] for turn in found) for side in range(3)]
    return Turns(medians[0], medians[1], medians[2], our_memory.peak, peer_memory.peak)


def step_rows(name: str, rounds: int, limits: dict[str, float]) -> Iterator[Row]:
    """Speed, share of the products, and memory of one model's step."""
    shape, tokens = f"{BATCH}x{TOKENS}", BATCH * TOKENS
    turns = take_turns(make_model(name), rounds)
    yield Row(
        metric=f"step_{name}_tokens_per_s", shape=shape, unit="tok/s", ours=tokens / turns.ours,
        peer=tokens / turns.peer, peer_name=PEER, ratio=turns.peer / turns.ours, limit=limits["speed"],
    )  # fmt: skip
    share = turns.products / turns.ours
    yield Row(
        metric=f"step_{name}_gemm_share", shape=shape, unit="share", ours=share, peer=1.0,
        peer_name="torch's bf16 products alone", ratio=share, limit=limits["share"],
    )  # fmt: skip
    if "memory" in limits:
        yield Row(
            metric=f"step_{name}_peak_anon_bytes", shape=shape, unit="bytes", ours=turns.our_peak, peer=turns.peer_peak,
            peer_name=PEER, ratio=turns.peer_peak / turns.our_peak, limit=limits["memory"],
        )  # fmt: skip


def packed_row() -> Row:
    """Useful tokens a second over 256 rows of realistic lengths, in one pass; the peer pads batches of 8."""
    directory, lengths = make_model("135m"), row_lengths()
    spent = [0.0, 0.0]
    with PeerProcess(ours) as mine, PeerProcess(theirs) as peer:
        for at in range(0, len(lengths), ROWS_AT_A_TIME):
            part = tuple(lengths[at : at + ROWS_AT_A_TIME])
            spent[0] += mine.prepare(directory, part)()
            spent[1] += peer.prepare(directory, False, part)()
    rates = [sum(lengths) / each for each in spent]
    return Row(
        metric="packed_tokens_per_s", shape="256 rows", unit="tok/s", ours=rates[0], peer=rates[1],
        peer_name=f"{PEER}, padded batches of {PADDED_BATCH}", ratio=rates[0] / rates[1], limit=3.5,
    )  # fmt: skip


MODELS: dict[str, tuple[int, dict[str, float]]] = {
    "135m": (9, {"speed": 2.2, "share": 0.6}),
    "1b": (5, {"speed": 1.5, "share": 0.75, "memory": 3.0}),
}


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    rows: list[Row] = []
    for name, (rounds, limits) in MODELS.items():
        metrics = [f"step_{name}_{what}" for what in ("tokens_per_s", "gemm_share", "peak_anon_bytes")]
        if any(options.only in metric for metric in metrics):
            rows += step_rows(name, min(options.rounds, rounds), limits)
    if options.only in "packed_tokens_per_s":
        rows.append(packed_row())
    report(rows, options.json)


if __name__ == "__main__":
    main()
