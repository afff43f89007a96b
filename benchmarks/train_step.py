"""A QLoRA training step against transformers + peft + bitsandbytes: speed, memory, packing, and the products alone.

Rank 16 on every linear layer, 2 × 512 tokens, every position supervised, AdamW and clipping included. The peer runs at
its best settings: bf16 autocast where the CPU has bf16, else float32; with or without checkpointing, whichever is
faster. Each side has a process of its own, and they take turns. Our layers keep everything, but in the row named lean,
where they keep their input alone: it must still be 1.5 times as fast as the peer, and its peak is the one that counts.
In the row that ends in `min` rows go one at a time besides (`training.memory: min`), and the peer checkpoints. Peaks
include loading.

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
SHAPE = f"{BATCH}x{TOKENS}"


def ours(
    model_path: Path,
    lengths: Lengths | None,
    quantize: str = "nf4",
    recompute: str = "nothing",
    micro_batch: int = BATCH,
) -> Work:
    """Our step over the standard batch, or over rows of these lengths, packed, `recompute` at every layer."""
    import torch

    import entrenar
    from entrenar.data.batches import micro_batches
    from entrenar.data.encode import Example
    from entrenar.layers.recompute import Recompute
    from entrenar.lora.attach import attach_lora
    from entrenar.models.acceleration.activations import decoder_layers, set_recompute
    from entrenar.objectives.supervised import SUPERVISED
    from entrenar.optim.adamw import make_adamw
    from entrenar.training.learner import Learner
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

    batches = micro_batches([example(n) for n in lengths or (TOKENS,) * BATCH], micro_batch, pad_id=0, pack_to=TOKENS)
    model.train()
    set_recompute(model, [Recompute(recompute)] * len(decoder_layers(model)))
    learner = Learner(model, optimizer, SUPERVISED)
    return lambda: update(learner, batches, 1e-4, 1.0)


def theirs(directory: Path, checkpointing: bool, lengths: Lengths | None) -> Work:
    """What a user of the peers writes; rows of these lengths are padded in batches of 8."""
    leave_this_folder()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if native else torch.float32
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=packing, dtype=dtype)
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
            with torch.autocast("cpu", torch.bfloat16, enabled=native):
                loss = model(**inputs, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def bare_products(directory: Path) -> Callable[[], float]:
    """Seconds of torch's products of a step, in the dtype we compute in: forward and input gradient of every base
    weight and the head."""
    import torch
    from transformers import AutoConfig

    from entrenar.opening.compute import native_dtype

    torch.set_num_threads(THREADS)
    dtype = native_dtype(torch.device("cpu"))
    config = AutoConfig.from_pretrained(directory)
    width, wide, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    layers = config.num_hidden_layers
    shapes = {(width, width): 2, (keys, width): 2, (wide, width): 2, (width, wide): 1}
    counted = [(shape, count * layers) for shape, count in shapes.items()] + [((config.vocab_size, width), 1)]

    def products(rows: int, columns: int) -> Work:
        tokens = BATCH * TOKENS
        x, weight, grad = (torch.randn(s).to(dtype) for s in ((tokens, columns), (rows, columns), (tokens, rows)))
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
class Side:
    """Median seconds of a side's turns, and its peak of anonymous memory in bytes."""

    seconds: float
    peak: int


@dataclass(frozen=True)
class Turns:
    """Ours keeping all, ours keeping little, the peer's faster setting, and the bare products' seconds."""

    ours: Side
    lean: Side
    peer: Side
    products: float


def take_turns(directory: Path, rounds: int) -> Turns:
    """Each side's step, one after the other, and the bare products."""
    import time

    with ExitStack() as stack:
        processes = [stack.enter_context(PeerProcess(work)) for work in (ours, ours, theirs, theirs)]
        memory = [stack.enter_context(each.peak_memory()) for each in processes]
        settings = ((None, "nf4", "nothing"), (None, "nf4", "all"), (False, None), (True, None))
        works = [each.prepare(directory, *choice) for each, choice in zip(processes, settings, strict=True)]
        works.append(bare_products(directory))
        for work in works:
            work()
        found: list[list[float]] = [[] for _ in works]
        for _ in range(rounds):
            for times, work in zip(found, works, strict=True):
                time.sleep(PAUSE)
                times.append(work())
        *medians, products = (statistics.median(times) for times in found)
    fast, lean, *peers = (Side(s, m.peak) for s, m in zip(medians, memory, strict=True))
    return Turns(fast, lean, min(peers, key=lambda side: side.seconds), products)


def least_memory(directory: Path) -> tuple[int, int]:
    """Peaks of two steps: ours with as little held as can be, the peer's with checkpointing."""
    with (
        PeerProcess(ours) as mine, PeerProcess(theirs) as peer,
        mine.peak_memory() as our_memory, peer.peak_memory() as peer_memory,
    ):  # fmt: skip
        for step in (mine.prepare(directory, None, "nf4", "all", 1), peer.prepare(directory, True, None)):
            step()
            step()
    return our_memory.peak, peer_memory.peak


def speed_row(metric: str, ours: Side, peer: Side, limit: float) -> Row:
    """Tokens a second."""
    tokens = BATCH * TOKENS
    return Row(
        metric=metric, shape=SHAPE, unit="tok/s", ours=tokens / ours.seconds, peer=tokens / peer.seconds,
        peer_name=PEER, ratio=peer.seconds / ours.seconds, limit=limit,
    )  # fmt: skip


def peak_row(metric: str, ours: int, peer: int, limit: float) -> Row:
    """Bytes of anonymous memory."""
    return Row(
        metric=metric, shape=SHAPE, unit="bytes", ours=ours, peer=peer, peer_name=PEER, ratio=peer / ours, limit=limit
    )


def step_rows(name: str, rounds: int, limits: dict[str, float]) -> Iterator[Row]:
    """Speed, share of the products, and memory of one model's step."""
    turns = take_turns(make_model(name), rounds)
    yield speed_row(f"step_{name}_tokens_per_s", turns.ours, turns.peer, limits["speed"])
    share = turns.products / turns.ours.seconds
    yield Row(
        metric=f"step_{name}_gemm_share", shape=SHAPE, unit="share", ours=share, peer=1.0,
        peer_name="torch's products alone", ratio=share, limit=limits["share"],
    )  # fmt: skip
    if "memory" in limits:
        yield speed_row(f"step_{name}_lean_tokens_per_s", turns.lean, turns.peer, limits["speed"])
        yield peak_row(f"step_{name}_peak_anon_bytes", turns.lean.peak, turns.peer.peak, limits["memory"])
        yield peak_row(f"step_{name}_peak_anon_bytes_keeping_all", turns.ours.peak, turns.peer.peak, 1.0)
        yield peak_row(f"step_{name}_peak_anon_bytes_min", *least_memory(make_model(name)), limits["least"])


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
    "1b": (5, {"speed": 1.5, "share": 0.75, "memory": 3.0, "least": 5.0}),
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
