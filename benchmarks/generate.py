"""Greedy text, a token at a time: with an adapter over nf4 against transformers + peft + bitsandbytes, and over the own
blocks of a GGUF against llama.cpp.

A prompt of 64 tokens, then so many new ones; the prompt's time counts. Each side has a process of its own, and they
take turns.

python benchmarks/generate.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _timing import PAUSE, PeerProcess, Row, Work, arguments, leave_this_folder, report
from train_step import ALPHA, PEER, RANK, THREADS, make_model

GGUF = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = tuple(range(100, 164))


def ours(model_path: Path, quantize: str, adapter: bool, count: int) -> Work:
    """Our model's `generate`, as the command calls it."""
    import torch

    import entrenar
    from entrenar.lora.attach import attach_lora

    torch.set_num_threads(THREADS)
    model: Any = entrenar.load(str(model_path), quantize)[0]
    if adapter:
        attach_lora(model, RANK, ALPHA)
    return partial(generated, model.eval(), count)


def theirs(directory: Path, count: int) -> Work:
    """The same of the peers; bfloat16 throughout."""
    leave_this_folder()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=packing, dtype=torch.bfloat16)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return partial(generated, get_peft_model(base, adapter).eval(), count)


def generated(model: Any, count: int) -> None:
    """`count` tokens behind the prompt, through transformers."""
    import torch

    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False,
        )  # fmt: skip


def llama_cpp(path: Path, count: int) -> Work:
    """The same of llama.cpp."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_threads=THREADS, n_threads_batch=THREADS, n_ctx=512, verbose=False)

    def run() -> None:
        model.reset()
        for index, _ in enumerate(model.generate(list(PROMPT), temp=0.0)):
            if index + 1 == count:
                return

    return run


def measure(
    metric: str, shape: str, mine: tuple[object, ...], peer: Callable[..., Work], other: tuple[object, ...],
    peer_name: str, count: int, rounds: int,
) -> Row:  # fmt: skip
    """Milliseconds a token of both sides."""
    with PeerProcess(ours) as first, PeerProcess(peer) as second:
        works = [first.prepare(*mine, count), second.prepare(*other, count)]
        for work in works:
            work()
        found: list[list[float]] = [[], []]
        for _ in range(rounds):
            for times, work in zip(found, works, strict=True):
                time.sleep(PAUSE)
                times.append(work() / count * 1e3)
    a, b = (statistics.median(times) for times in found)
    return Row(metric=metric, shape=shape, unit="ms", ours=a, peer=b, peer_name=peer_name, ratio=b / a, limit=1.0)


def rows(rounds: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row, by name."""
    for name, count in (("135m", 32), ("1b", 8)):
        metric = f"generate_{name}_nf4_adapter"

        def over_nf4(name: str = name, count: int = count, metric: str = metric) -> Row:
            path = make_model(name)
            return measure(metric, name, (path, "nf4", True), theirs, (path,), PEER, count, rounds)

        yield metric, over_nf4
    metric = "generate_gguf_blocks"
    yield metric, lambda: measure(metric, "SmolLM2", (GGUF, "keep", False), llama_cpp, (GGUF,), "llama.cpp", 32, rounds)


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    rounds = min(options.rounds, 5)
    report([row() for metric, row in rows(rounds) if options.only in metric], options.json)


if __name__ == "__main__":
    main()
