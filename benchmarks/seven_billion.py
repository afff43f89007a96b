"""A 7B shape on one small machine: load it from bf16 safetensors into nf4 and take three training steps, inside 6 GB.

Rank 16 on every linear layer, 2 × 512 tokens, a row at a time, layers keep their input alone (`training.memory: min`).
There is no peer: what bitsandbytes reads, 13.5 GB, is more than the bound. The random checkpoint is made once, in the
temporary directory.

python benchmarks/seven_billion.py [--json FILE]
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path

from _timing import Row, arguments, report
from train_step import SHAPE, ours

from entrenar.core.memory import PeakMemory

BOUND = 6_000_000_000
STEPS = 3


def make_model() -> Path:
    """The checkpoint, made by another process, whose memory must not count."""
    code = "from _models import *; print(random_checkpoint('llama-7b', LLAMA_7B))"
    made = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    return Path(made.stdout.decode().splitlines()[-1])


def main() -> None:
    """Load, step, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    directory = make_model()
    marks = [time.perf_counter()]
    with PeakMemory() as memory:
        step = ours(directory, None, "nf4", "all", 1)
        marks.append(time.perf_counter())
        for _ in range(STEPS):
            step()
            marks.append(time.perf_counter())
    spent = [f"{after - before:.1f}" for before, after in itertools.pairwise(marks)]
    print(f"loading {spent[0]} s, steps of {', '.join(spent[1:])} s")
    held = Row(
        metric="step_7b_peak_anon_bytes", shape=SHAPE, unit="bytes", ours=memory.peak, peer=BOUND,
        peer_name="6 GB", ratio=BOUND / memory.peak, limit=1.0,
    )  # fmt: skip
    report([held], options.json)


if __name__ == "__main__":
    main()
