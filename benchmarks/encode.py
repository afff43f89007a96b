"""From chat rows to token ids and masks, and what a tree saves over rows expanded by hand.

python benchmarks/encode.py [--json FILE] [--only METRIC] [--rounds N]

`encode_rows_per_s`: 20,000 rows of three turns on SmolLM2's tokenizer, each side in a process of its own that begins
anew for every round (two processes encode in each). The peer is what TRL's SFT preparation does of a conversation with
`assistant_only_loss`: `datasets.map` with `num_proc=2` over `apply_chat_template(return_assistant_tokens_mask=True)`,
with a template that marks what the assistant says; it renders a row once and does not ask what a server would send.
`multi_turn_step_tokens_saved`: forward and backward of 8 conversations of six turns with thoughts that the template
leaves out of earlier turns; both sides are ours.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _timing import Row, arguments, duration, report

TOKENIZER = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, TURNS = 20_000, 3
# SmolLM2's own, with what the assistant says marked.
MARKED = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = """the of and to in is you that it he was for on are as with his they at be this have from or one had
by word but not what all were we when your can said there use an each which she do how their if will
up other about out many then them these so some her would make like him into time has look two more
write go see number no way could people"""
WORDS = _TEXT.split()


def text(draw: random.Random, least: int, most: int) -> str:
    """Some words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most))).capitalize() + "."


def write_rows(path: Path, count: int) -> None:
    """Conversations of three questions and answers."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            pairs = [
                ("user", text(draw, 10, 40)) if i % 2 == 0 else ("assistant", text(draw, 20, 80))
                for i in range(2 * TURNS)
            ]
            file.write(json.dumps({"messages": [{"role": role, "content": said} for role, said in pairs]}) + "\n")


def ours(path: Path) -> float:
    """Seconds of reading and encoding, and how many tokens are trained."""
    from entrenar.data.dataset import prepare
    from entrenar.opening.source import open_source

    tokenizer = open_source(str(TOKENIZER)).tokenizer
    start = time.perf_counter()
    data = prepare(tokenizer, path, max_length=2048, date="2026-01-01")
    elapsed = time.perf_counter() - start
    print(len(data.train), sum(sum(example.trained) for example in data.train.examples[:100]), file=sys.stderr)
    return elapsed


def theirs(path: Path) -> float:
    """The same by datasets and transformers, with its cache empty."""
    from datasets import load_dataset

    from entrenar.opening.source import open_source

    tokenizer = open_source(str(TOKENIZER)).tokenizer
    tokenizer.chat_template = MARKED

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        encoded: Any = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        rows: Any = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        done = rows.map(tokenized, num_proc=2)
        elapsed = time.perf_counter() - start
        print(len(done), sum(map(sum, done[:100]["assistant_masks"])), file=sys.stderr)
    return elapsed


def encoding(rounds: int) -> Row:
    """Both sides take turns, each in a new process."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, ROWS)
        for _ in range(rounds):
            for side, seconds in times.items():
                command = [sys.executable, __file__, "--side", side, "--rows", str(path)]
                seconds.append(
                    float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
                )
    rates = [ROWS / median(seconds) for seconds in times.values()]
    return Row(
        metric="encode_rows_per_s", shape=f"{ROWS}x{TURNS}", unit="rows/s", ours=rates[0], peer=rates[1],
        peer_name="datasets.map, as TRL", ratio=rates[0] / rates[1], limit=3.0,
    )  # fmt: skip


def trees(rounds: int) -> Row:
    """A step over trees, and over the same rows expanded."""
    import entrenar
    from entrenar.data.batches import micro_batches
    from entrenar.data.encode import encode
    from entrenar.data.rows import Row as DataRow
    from entrenar.objectives.supervised import SUPERVISED

    model, tokenizer = entrenar.load(str(TOKENIZER), quantize="nf4")
    entrenar.attach_lora(model, rank=8, alpha=16)
    tokenizer.chat_template = FORGETFUL
    draw = random.Random(0)
    conversations = [
        tuple(
            {"role": "user", "content": text(draw, 10, 30)}
            if i % 2 == 0
            else {"role": "assistant", "content": text(draw, 20, 40), "reasoning_content": text(draw, 40, 80)}
            for i in range(12)
        )
        for _ in range(8)
    ]
    examples = [encode(DataRow(line, turns), tokenizer) for line, turns in enumerate(conversations, 1)]
    expanded = [row for example in examples for row in example.expanded()]
    assert all(len(example.branches) == 5 for example in examples)
    print(f"tokens: {sum(map(len, examples))} in trees, {sum(map(len, expanded))} expanded")

    def step(rows: list[Any]) -> float:
        start = time.perf_counter()
        for batch in micro_batches(rows, 1, 0, 2048):
            SUPERVISED.loss(model, batch).total.backward()
        return time.perf_counter() - start

    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for seconds, rows in zip(times, (examples, expanded), strict=True):
            seconds.append(step(rows))
    return duration(
        "multi_turn_step_tokens_saved", "8x6", (median(times[0]), median(times[1])), "expanded rows (ours)", 2.0
    )


def main() -> None:
    """The table; or one side in a process of its own."""
    if "--side" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side")
        parser.add_argument("--rows", type=Path)
        given = parser.parse_args()
        print({"ours": ours, "theirs": theirs}[given.side](given.rows))
        return
    given = arguments(__doc__ or "")
    rounds = min(given.rounds, 3)
    metrics = {"encode_rows_per_s": encoding, "multi_turn_step_tokens_saved": trees}
    report([make(rounds) for name, make in metrics.items() if given.only in name], given.json)


if __name__ == "__main__":
    main()
