"""`make demo`: fine-tune SmolLM2-135M with QLoRA on this CPU, measure it before and after, and ship it as GGUF.

The task: plain English → one JSON command (480 rows; 64 held-out rows whose phrasings never occur in training).
"""

import itertools
import time
from pathlib import Path

import entrenar
from entrenar.cli.numbers import human_bytes, human_seconds
from entrenar.cli.progress import TrainingProgress
from entrenar.core.memory import PeakMemory
from entrenar.recipes.evaluate import Evaluation

CONFIG = "examples/quickstart.yaml"
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = "examples/quickstart/heldout.jsonl"


def main() -> None:
    """Measure, train, measure again, export, and say what came of it."""
    started = time.monotonic()
    with PeakMemory() as memory:
        print("before: answering the held-out requests with the 4-bit base model…")
        before = entrenar.evaluate(MODEL, HELD_OUT, quantize="nf4")
        print(f"exact match before: {before.exact_match:.1%}\n")
        with TrainingProgress() as progress:
            result = entrenar.train(CONFIG, {"output": free_name()}, on_step=progress.step, say=progress.say)
        print("\nafter: the same requests with the adapter…")
        after = entrenar.evaluate(MODEL, HELD_OUT, adapter=result.adapter)
        gguf = entrenar.export(
            MODEL, Path(result.run_dir) / "model.q8_0.gguf", adapter=result.adapter, to="gguf", type="q8_0"
        )
    show_answers(before, after)
    print(
        f"\nexact match on {after.rows} held-out rows: {before.exact_match:.1%} before, {after.exact_match:.1%} after"
    )
    print(f"{human_seconds(time.monotonic() - started)} in all, peak anonymous memory {human_bytes(memory.peak)}")
    print(f"PEFT adapter   {result.adapter}\nGGUF (q8_0)    {gguf}   for llama.cpp: llama-cli -m {gguf}")


def free_name() -> str:
    """The first runs/demo-N that is not taken: no earlier run is touched."""
    return next(name for n in itertools.count(1) if not Path(name := f"runs/demo-{n}").exists())


def show_answers(before: Evaluation, after: Evaluation, count: int = 4) -> None:
    """A few requests, answered by the base model and by the fine-tuned one."""
    step = max(len(after.answers) // count, 1)
    for old, new in list(zip(before.answers, after.answers, strict=True))[::step][:count]:
        print(f"\nrequest  {new.prompt}\n before  {' '.join(old.actual.split())[:90]}\n  after  {new.actual}")


if __name__ == "__main__":
    main()
