"""GGUF: export against llama.cpp's own quantizer from the same f16 file, and a training step over blocks against nf4.

Each side has a process of its own; they take turns, and write to the temporary directory. (Not called gguf.py: the
scripts here import the package of that name.)

python benchmarks/gguf_export.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME_OR_SIZE]
"""

import ctypes
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _models import LLAMA_1B, LLAMA_135M, random_checkpoint
from _timing import PeerProcess, Row, Work, arguments, report
from train_step import BATCH, TOKENS
from train_step import ours as step_of

THREADS = 2
PEER = "llama.cpp's quantize"
FOLDER = Path(tempfile.gettempdir()) / "entrenar-benchmarks"
SIZES = {"135M": ("llama-135m", LLAMA_135M), "1.1B": ("llama-1b", LLAMA_1B)}
LIMITS = {"q4_k_m": 1.0, "q8_0": 1.5}
MEMORY = 700e6  # bytes of anonymous memory, at most


def ours(source: Path, target: Path, type: str) -> Work:
    """Our export."""
    import torch

    import entrenar

    torch.set_num_threads(THREADS)

    def run() -> None:
        target.unlink(missing_ok=True)
        entrenar.export(str(source), target, to="gguf", type=type)

    return run


def theirs(source: Path, target: Path, type: str) -> Work:
    """llama.cpp's."""
    import llama_cpp

    from entrenar.gguf.types import FILE_TYPES

    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[type].number, THREADS

    def run(_keep: object = silent) -> None:
        assert llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.pointer(params)) == 0

    return run


def original(size: str) -> Path:
    """A random model as an f16 GGUF, made once."""
    import entrenar

    path = FOLDER / f"{size}-f16.gguf"
    if not path.is_file():
        entrenar.export(str(random_checkpoint(*SIZES[size])), path, to="gguf", type="f16")
    return path


def error(path: Path, source: Path) -> float:
    """Root mean squared error of all weights."""
    from entrenar.gguf.reader import GGUFFile

    found, exact = GGUFFile(path), GGUFFile(source)
    total = sum(float((found.read(n).float() - exact.read(n).float()).square().sum()) for n in exact.tensors)
    return (total / sum(info.size / 2 for info in exact.tensors.values())) ** 0.5


def turns(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Median seconds of the two, in turn."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def export_rows(type: str, size: str, rounds: int) -> list[Row]:
    """Seconds, weight error and peak memory of one type at one size."""
    source = original(size)
    targets = [FOLDER / f"{size}-{type}-{side}.gguf" for side in ("ours", "theirs")]
    with PeerProcess(ours) as one, PeerProcess(theirs) as other:
        runs = [side.prepare(source, target, type) for side, target in zip((one, other), targets, strict=True)]
        with one.peak_memory() as memory:
            seconds = turns(runs[0], runs[1], rounds)
    errors = [error(target, source) for target in targets]
    row = partial(Row, shape=size, peer_name=PEER)
    return [
        row(metric=f"export_{type}_seconds", unit="s", ours=seconds[0], peer=seconds[1],
            ratio=seconds[1] / seconds[0], limit=LIMITS[type]),
        row(metric=f"export_{type}_rmse", unit="weight", ours=errors[0], peer=errors[1],
            ratio=errors[1] / errors[0], limit=1.0),
        row(metric=f"export_{type}_peak_memory", unit="MB", ours=memory.peak / 1e6, peer=MEMORY / 1e6,
            ratio=MEMORY / memory.peak, limit=1.0),
    ]  # fmt: skip


def step_row(size: str, rounds: int) -> Row:
    """Tokens a second of a training step over Q4_K blocks, against the same over nf4."""
    import entrenar

    source, blocks = original(size), FOLDER / f"{size}-q4_k_s.gguf"
    if not blocks.is_file():
        entrenar.export(str(source), blocks, to="gguf", type="q4_k_s")
    with PeerProcess(step_of) as kept, PeerProcess(step_of) as nf4:
        run = kept.prepare(blocks, None, "keep")
        times = turns(run, nf4.prepare(random_checkpoint(*SIZES[size]), None, "nf4"), rounds)
    ours, peer = (BATCH * TOKENS / each for each in times)
    return Row(
        metric="step_gguf_q4_k_tokens_per_s", shape=size, unit="tokens/s", ours=ours, peer=peer,
        peer_name="ours on nf4", ratio=ours / peer, limit=0.85,
    )  # fmt: skip


def main() -> None:
    """Run the rows asked for."""
    options, rows = arguments(__doc__ or ""), []
    rounds = min(options.rounds, 3)
    for size in SIZES:
        for type in LIMITS:
            if options.only in f"export_{type}_{size}":
                rows += export_rows(type, size, rounds)
    if options.only in "step_gguf_q4_k_1.1B":
        rows.append(step_row("1.1B", rounds))
    report(rows, options.json)


if __name__ == "__main__":
    main()
