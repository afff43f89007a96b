"""Merging two adapters trained for two small tasks on SmolLM2: what each way of merging keeps of both.

The tasks: the quickstart's (a sentence → a JSON command), and numbers in words → digits. Each adapter is trained over
the same bf16 weights, `model+adapter` is merged, and the result answers both held-out sets greedily.

python benchmarks/two_adapters.py [--json FILE]; about ten minutes.
"""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from _timing import Row, arguments, report
from transformers import AutoTokenizer

import entrenar
from entrenar.core.config import load_config
from entrenar.recipes.config import RunConfig

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
HELD_OUT = ROOT / "examples" / "quickstart" / "heldout.jsonl"
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
ONES, TENS = _WORDS.split()[:20], _WORDS.split()[20:]
ASKS = ("Write {} in digits.", "What is {} as a number?", "{} in figures, please.", "Digits for {}:")
WAYS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.5},
    "fisher": {"weight": 1.0},
    "regmean": {"weight": 1.0},
}
MEASURED = ("fisher", "regmean")  # each adapter on its own training rows


def words(number: int) -> str:
    """A number below 1,000 in English."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    rest = f" {words(number % 100)}" if number % 100 else ""
    return f"{ONES[number // 100]} hundred{rest}"


def number_rows(count: int, held_out: int) -> tuple[list[str], list[str]]:
    """Rows to train on, and other numbers to be asked for."""
    draw = random.Random(0)
    numbers = draw.sample(range(1000), count + held_out)
    rows = [
        json.dumps({"prompt": draw.choice(ASKS).format(words(number)), "completion": str(number)}) for number in numbers
    ]
    return rows[:count], rows[count:]


def as_text(rows: Path, base: Path) -> Path:
    """The rows of a file as the model reads them, one after the other, in a text file beside the base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
            tokenize=False,
        )
        for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    ]
    file = base.with_name(f"{rows.stem}.txt")
    file.write_text("".join(texts), encoding="utf-8")
    return file


def merged(way: str, base: Path, adapters: dict[str, Path], folder: Path) -> Path:
    """The two adapters (each with its text) over the base, merged."""
    models = [
        {"model": f"{base}+{adapter}", "parameters": WAYS[way] | ({"text": str(text)} if way in MEASURED else {})}
        for adapter, text in adapters.items()
    ]
    config: dict[str, object] = {"merge_method": way, "dtype": "bfloat16", "models": models}
    if way not in ("linear", *MEASURED):
        config["base_model"] = str(base)
    (folder / f"{way}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    entrenar.merge(str(folder / f"{way}.yaml"), str(folder / way))
    return folder / way


def exact_matches(model: Path, held_out: list[Path], adapter: str | None = None) -> list[float]:
    """Share of each task's held-out answers."""
    found = [entrenar.evaluate(str(model), rows, adapter=adapter).exact_match for rows in held_out]
    return [float(share or 0.0) for share in found]


def main() -> None:
    """Train twice, merge in each way, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    config = load_config(RunConfig, QUICKSTART, {})
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        entrenar.export(config.model.path, base, type="bf16")
        files = [folder / "numbers.jsonl", folder / "numbers-held-out.jsonl"]
        for file, rows in zip(files, number_rows(480, 64), strict=True):
            file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        held_out = [HELD_OUT, files[1]]
        adapters: dict[str, Path] = {}
        for task, data in (("commands", ROOT / config.data.train[0].path), ("numbers", files[0])):
            changes = {
                "output": str(folder / task), "model.path": str(base), "model.quantize": "none",
                "data.train": str(data), "training.seed": 1,
            }  # fmt: skip
            adapters[entrenar.train(QUICKSTART, changes).adapter] = as_text(data, base)
        alone = [exact_matches(base, held_out, adapter) for adapter in adapters]
        print(f"commands' adapter: {alone[0]}, numbers': {alone[1]} (commands, numbers)")
        kept = {way: exact_matches(merged(way, base, adapters, folder), held_out) for way in WAYS}
    for way, shares in kept.items():
        print(f"{way:16} commands {shares[0]:.1%}, numbers {shares[1]:.1%}")
    means = {way: sum(shares) / 2 for way, shares in kept.items()}
    row = Row(
        metric="two_tasks_exact_match", shape="mean of both", unit="share", ours=means["ties"], peer=means["linear"],
        peer_name="ours, linear", ratio=means["ties"] / max(means["linear"], 1e-9), limit=1.0,
    )  # fmt: skip
    report([row], options.json)


if __name__ == "__main__":
    main()
