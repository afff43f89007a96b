"""Merging against mergekit 0.1.5: seconds and memory of whole commands, imports included, over bf16 models.

Every turn is a fresh process on each side. mergekit lives in build/mergekit, an environment of its own (`make interop`
or `make bench` makes it). The models (2.2 GB each at the full size) are made once, in the temporary directory.

python benchmarks/merge.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME] [--layers 22]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from _timing import Row, report

ROOT = Path(__file__).parents[1]
MERGEKIT = ROOT / "build" / "mergekit" / "bin" / "mergekit-yaml"
THREADS = 2
NAMES = ("base", "a", "b")
SPREAD = 0.01  # standard deviation of what was learned
# metric → method, its parameters for each model, shared ones, models, ratio to reach
CASES: dict[str, tuple[str, str, str, Sequence[str], float]] = {
    "ties_3x1b_seconds": ("ties", "weight: 0.5, density: 0.5", "", NAMES, 12),
    "dare_ties_3x1b_seconds": ("dare_ties", "weight: 0.5, density: 0.5", "", NAMES, 8),
    "della_3x1b_seconds": ("della", "weight: 0.5, density: 0.5", "", NAMES, 8),
    "linear_3x1b_seconds": ("linear", "weight: 0.5", "", NAMES, 4),
    "slerp_2x1b_seconds": ("slerp", "", "t: 0.4", NAMES[:2], 4),
}


@dataclass(frozen=True)
class Turn:
    """One command: wall seconds, and the peak of its anonymous memory in bytes."""

    seconds: float
    peak: int


def make_models(layers: int) -> Path:
    """The directory of the three models."""
    import torch
    from _models import LLAMA_1B
    from transformers import AutoModelForCausalLM, LlamaConfig

    from entrenar.files.lazy_tensor import LazyTensor
    from entrenar.files.safetensors import write_checkpoint

    changes = {"num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"]}  # mergekit asks for the latter
    config = LlamaConfig(**{**LLAMA_1B.to_dict(), **changes})
    root = Path(os.environ.get("TMPDIR", "/tmp")) / "entrenar-benchmarks" / f"merge-{layers}"
    if (root / "complete").is_file():
        return root
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def values(shape: tuple[int, ...], index: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        base = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        own = torch.Generator().manual_seed(1000 * number + index)
        return base + torch.randn(shape, generator=own) * SPREAD if number else base

    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(root / name)
        tensors = [
            LazyTensor(key, tuple(parameter.shape), partial(values, tuple(parameter.shape), index, number))
            for index, (key, parameter) in enumerate(model.named_parameters())
        ]
        write_checkpoint(root / name, tensors, torch.bfloat16, 5 * 10**9)
    (root / "complete").touch()
    return root


def write_config(root: Path, metric: str) -> Path:
    """The YAML of one case."""
    method, each, shared, names, _ = CASES[metric]
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method != "linear":
        lines.append(f"base_model: {root / 'base'}")
    if shared:
        lines.append(f"parameters: {{{shared}}}")
    lines.append("models:")
    for name in names:
        own = each if name != "base" or method == "linear" else ""
        lines.append(f"  - {{model: {root / name}" + (f", parameters: {{{own}}}}}" if own else "}"))
    path = root / f"{metric}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(side: str, config: Path, output: Path) -> Turn:
    """Run one side's command once."""
    from entrenar.core.memory import PeakMemory

    shutil.rmtree(output, ignore_errors=True)
    ours = [sys.executable, "-m", "entrenar", "merge", str(config), str(output)]
    theirs = [str(MERGEKIT), str(config), str(output), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        ours if side == "ours" else theirs, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with PeakMemory(process=process.pid) as watch:
        code = process.wait()
    seconds = time.perf_counter() - start
    shutil.rmtree(output, ignore_errors=True)
    if code:
        raise SystemExit(f"{side} failed on {config} with {code}")
    return Turn(seconds, watch.peak)


def plain_copy(root: Path, output: Path) -> float:
    """Seconds to read the inputs and write one output, one after the other, and flush it."""
    start = time.perf_counter()
    with output.open("wb", buffering=0) as target:
        for name in NAMES:
            with (root / name / "model.safetensors").open("rb", buffering=0) as source:
                while block := source.read(1 << 23):
                    if name == "base":
                        target.write(block)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    output.unlink()
    return seconds


def row(metric: str, unit: str, ours: float, peer: float, name: str, limit: float, shape: str) -> Row:
    """A row in which less is better."""
    return Row(
        metric=metric, shape=shape, unit=unit, ours=ours, peer=peer, peer_name=name, ratio=peer / ours, limit=limit
    )


def compare(root: Path, metric: str, rounds: int, shape: str) -> list[Row]:
    """Both sides in turn; TIES says memory and the share of plain input and output besides."""
    config, output = write_config(root, metric), root / "out"
    command("ours", config, output)  # puts the files into the page cache
    pairs = [(command("ours", config, output), command("mergekit", config, output)) for _ in range(rounds)]
    ours, theirs = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
    rows = [row(metric, "s", ours, theirs, "mergekit", CASES[metric][4], shape)]
    if metric.startswith("ties"):
        peaks = [max(pair[side].peak for pair in pairs) for side in (0, 1)]
        rows.append(row("ties_3x1b_peak_anon_bytes", "bytes", peaks[0], peaks[1], "mergekit", 10, shape))
        plain = statistics.median(plain_copy(root, output) for _ in range(3))
        rows.append(row("ties_3x1b_io_share", "s", ours, plain, "plain read and write", 0.4, shape))
    return rows


def main() -> None:
    """Merge in turn, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--only", default="", help="only metrics whose name contains this")
    parser.add_argument("--layers", type=int, default=22, help="of the models; 22 is 1.1B parameters")
    options = parser.parse_args()
    if not MERGEKIT.is_file():
        raise SystemExit(f"{MERGEKIT} is missing: see the top of this file")
    root = make_models(options.layers)
    shape = f"{options.layers}x2048"
    rows = [
        found
        for metric in CASES
        if options.only in metric
        for found in compare(root, metric, min(options.rounds, 3), shape)
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
