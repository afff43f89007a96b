"""Loading a 1.1B Llama from bf16 safetensors into nf4: seconds against the peers, memory against its bound.

Every turn is a fresh process in which the libraries are imported first; the files are in the page cache. Ours reads the
tokenizer too, the peer only the model. The checkpoint (2.2 GB) is made once, in the temporary directory.

python benchmarks/load.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME]
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from _timing import Row, arguments, leave_this_folder, report

THREADS = 2
ROUNDS = 3  # the peer takes a quarter of a minute
ALLOWANCE = 400_000_000  # bytes of libraries and buffers, beside the weights held and one tensor


@dataclass(frozen=True)
class Load:
    """One load in a fresh process: seconds, and bytes of anonymous memory at the peak, of parameters, of one tensor."""

    seconds: float
    peak: int = 0
    held: int = 0
    largest: int = 0


def ours(directory: Path) -> Load:
    """`entrenar.load`, with the peak of the whole process."""
    import torch

    import entrenar
    import entrenar.opening.load
    from entrenar.core.memory import PeakMemory
    from entrenar.files.safetensors import SafetensorsCheckpoint

    torch.set_num_threads(THREADS)
    with PeakMemory(interval=0.005) as watch:
        start = time.perf_counter()
        model, _ = entrenar.load(str(directory), "nf4")
        seconds = time.perf_counter() - start
    held = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(info.size for info in SafetensorsCheckpoint(directory).tensors.values())
    return Load(seconds, watch.peak, held, largest)


def theirs(directory: Path) -> Load:
    """What a user of the peers writes."""
    leave_this_folder()
    import bitsandbytes  # noqa: F401 - its import is not counted
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(directory, quantization_config=packing, dtype=torch.bfloat16)
    return Load(time.perf_counter() - start)


def measure(work: Callable[[Path], Load], directory: Path) -> Load:
    """Run it in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, work, directory))
    process.start()
    found: Load = here.recv()
    process.join()
    return found


def _answer(pipe: Connection, work: Callable[[Path], Load], directory: Path) -> None:
    pipe.send(work(directory))


def make_model() -> Path:
    """The checkpoint; a function, so that the peer's process does not import entrenar."""
    from _models import LLAMA_1B, random_checkpoint

    return random_checkpoint("llama-1b", LLAMA_1B)


def seconds_row(mine: list[Load], peer: list[Load]) -> Row:
    """How long until the model can be used."""
    first, second = (statistics.median(load.seconds for load in loads) for loads in (mine, peer))
    return Row(
        metric="load_1b_seconds", shape="22x2048", unit="s", ours=first, peer=second,
        peer_name="transformers + bitsandbytes", ratio=second / first, limit=5.0,
    )  # fmt: skip


def peak_row(mine: list[Load]) -> Row:
    """The whole process, libraries included, against the bound: a ratio of 1 is the bound itself."""
    peak = max(load.peak for load in mine)
    bound = mine[0].held + mine[0].largest + ALLOWANCE
    return Row(
        metric="load_1b_peak_anon_bytes", shape="22x2048", unit="bytes", ours=peak, peer=bound,
        peer_name="held + largest tensor + 400 MB", ratio=bound / peak, limit=1.0,
    )  # fmt: skip


def main() -> None:
    """Load in turn, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    directory = make_model()
    rounds = min(options.rounds, ROUNDS)
    compared = options.only in "load_1b_seconds"
    mine, peer = [measure(ours, directory)], []  # the first puts the files into the page cache and does not count
    for _ in range(rounds):
        mine.append(measure(ours, directory))
        if compared:
            peer.append(measure(theirs, directory))
    rows = [seconds_row(mine[1:], peer)] if compared else []
    if options.only in "load_1b_peak_anon_bytes":
        rows.append(peak_row(mine))
    report(rows, options.json)


if __name__ == "__main__":
    main()
