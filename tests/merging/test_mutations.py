"""Configs, journals and models' files that somebody changed: one sentence of InputError or a merge, in bounded time."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrenar.core.errors import EntrenarError
from entrenar.merging.config import read_merge_config
from entrenar.merging.place import working_directory
from entrenar.merging.plan import make_plan
from entrenar.recipes.merge import merge
from tests.support.models_on_disk import tensors, write_model, write_tokenizer

ROUNDS = 60
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**12, -(10**30), 10**400, 0.5, 1e308, float("inf"), float("nan"), "", "x", "0",
    "1e3", "\0", "\x1b[2J", "é" * 300, [], [[]], [1, [2]], [0, 10**12], {}, {"a": {}}, {"filter": 3, "value": 1},
    {"value": [[1]]}, [{"filter": "mlp"}], [{"value": {}}], [None], [1, "a"], [True, 2], "union", "base", "/dev/zero",
    "/proc/self/mem", "..", "~", "ties", "linear", "passthrough", "bfloat16",
]  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy with one place changed, dropped, doubled or renamed."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(value)
    for _ in range(chance.choice((1, 1, 2))):
        part, key = chance.choice(places)
        act = chance.random()
        if act < 0.15 and isinstance(part, dict):
            part.pop(key, None)
        elif act < 0.25 and isinstance(part, dict) and key in part:
            part[f"{key}s"] = part[key]
        elif act < 0.35 and isinstance(part, list):
            part.append(copy.deepcopy(part[key]) if len(part) > key else None)
        elif act < 0.4:
            nested: Any = []
            for _ in range(300):
                nested = [nested]
            put(part, key, nested)
        else:
            put(part, key, chance.choice(ODD))
    return value


def put(part: Any, key: Any, new: Any) -> None:
    if isinstance(part, dict) or len(part) > key:
        part[key] = new


def tried(work: Callable[[], object]) -> float:
    """Seconds; nothing but EntrenarError comes out, each of them short enough to read."""
    before = time.perf_counter()
    try:
        work()
    except EntrenarError as error:
        assert len(str(error)) < 20_000
    return time.perf_counter() - before


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pair")
    paths = [write_model(root / name, tensors(seed)) for seed, name in enumerate("ab")]
    for path in paths:
        write_tokenizer(path, [chr(97 + index) for index in range(20)])
    return paths


def configs(pair: list[str]) -> list[dict[str, Any]]:
    a, b = pair
    gradient = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]
    return [
        {"merge_method": "ties", "base_model": a, "parameters": {"normalize": True, "lambda": 0.5}, "dtype": "float32",
         "models": [{"model": b, "parameters": {"weight": gradient, "density": [0.2, 0.7]}}, {"model": a}]},
        {"merge_method": "passthrough", "slices": [
            {"sources": [{"model": a, "layer_range": [0, 2], "parameters": {"scale": 0.5}}]},
            {"sources": [{"model": b, "layer_range": [1, 3]}]}]},
        {"merge_method": "slerp", "base_model": a, "parameters": {"t": [0, 0.5]}, "tokenizer_source": "union",
         "chat_template": "auto", "modules": {"all": {"models": [{"model": a}, {"model": b}]}}},
    ]  # fmt: skip


def test_a_config_that_was_changed(pair: list[str], tmp_path: Path) -> None:
    chance, longest = random.Random(1), 0.0
    for number in range(ROUNDS):
        values = mutated(chance.choice(configs(pair)), chance)
        path = tmp_path / "m.yaml"
        if number % 2:
            path.write_text(yaml.safe_dump(values), encoding="utf-8")
        source: Any = path if number % 2 else values
        longest = max(longest, tried(lambda source=source: make_plan(read_merge_config(source)[0])))
    assert longest < 2


def test_text_of_a_config_that_was_changed(pair: list[str], tmp_path: Path) -> None:
    chance = random.Random(2)
    path = tmp_path / "m.yaml"
    for _ in range(ROUNDS):
        text = bytearray(yaml.safe_dump(chance.choice(configs(pair))).encode())
        for _ in range(chance.choice((1, 3))):
            text[chance.randrange(len(text))] = chance.choice(b"\x00\xff :-[]{}&*!'\"#|>?%@`,0x_~\n")
        path.write_bytes(bytes(text))
        assert tried(lambda: make_plan(read_merge_config(path)[0])) < 2


def test_a_models_json_that_was_changed(pair: list[str], tmp_path: Path) -> None:
    chance, model = random.Random(3), Path(write_model(tmp_path / "c", tensors(2)))
    write_tokenizer(str(model), [chr(97 + index) for index in range(20)])
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    good = {name: json.loads((model / name).read_text()) for name in
            ("config.json", "tokenizer.json", "tokenizer_config.json")}  # fmt: skip
    good["config.json"] |= {
        "text_config": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
        "mlp_only_layers": [1],
    }
    slices = [{"sources": [{"model": str(model), "layer_range": [first, 3]}]} for first in (0, 1)]
    changed = [
        {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(model)}, {"model": pair[0]}],
         "tokenizer_source": "union", "chat_template": "auto"},
        {"merge_method": "passthrough", "slices": slices},
    ]  # fmt: skip
    for number in range(ROUNDS // 2):
        name = chance.choice(list(good))
        (model / name).write_text(json.dumps(mutated(good[name], chance)), encoding="utf-8")
        output = tmp_path / f"out-{number}"
        assert tried(lambda output=output: merge(chance.choice(changed), output)) < 3
        (model / name).write_text(json.dumps(good[name]))


def test_a_journal_that_was_changed(pair: list[str], tmp_path: Path) -> None:
    def stop(done: int, size: int) -> None:
        if done * 2 > size:
            raise KeyboardInterrupt

    config, chance, output = configs(pair)[0], random.Random(4), tmp_path / "out"
    merge(config, tmp_path / "straight")
    straight = (tmp_path / "straight" / "model.safetensors").read_bytes()
    report = (tmp_path / "straight" / "merge-report.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        merge(config, output, progress=stop)
    journal = working_directory(output) / "journal.jsonl"
    kept = {path.name: path.read_bytes() for path in journal.parent.iterdir()}
    for _ in range(12):
        lines = [json.loads(line) for line in kept["journal.jsonl"].splitlines()]
        text = "".join(json.dumps(line) + "\n" for line in mutated(lines, chance)).encode()
        if chance.random() < 0.3:
            place = chance.randrange(len(text))
            text = text[:place] + bytes([chance.randrange(256)]) + text[place + chance.randrange(3) :]
        journal.write_bytes(text)
        assert tried(lambda: merge(config, output)) < 3
        assert (output / "model.safetensors").read_bytes() == straight
        assert (output / "merge-report.json").read_text() == report
        output.rename(tmp_path / f"done-{time.monotonic_ns()}")
        journal.parent.mkdir()
        for name, content in kept.items():
            (journal.parent / name).write_bytes(content)
