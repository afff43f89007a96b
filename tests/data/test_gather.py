"""Several sources as one training set: counts, shapes, what is held out, and errors by file and line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data.dataset import Dataset, load_evaluation, prepare
from entrenar.data.rows import places
from entrenar.data.sources import Source


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _texts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {number}"} for number in range(count)]


def _contents(dataset: Dataset | None) -> list[str]:
    return [row.text or str(row.messages[-1]["content"]) for row in dataset.rows] if dataset else []


def _source(path: str, **measure: float) -> Source:
    return Source.model_validate({"path": path, **measure})


@pytest.fixture
def three(tmp_path: Path) -> dict[str, str]:
    return {name: _write(tmp_path / f"{name}.jsonl", _texts(name, count)) for name, count in (("a", 60), ("b", 20))} | {
        "c": _write(tmp_path / "c" / "1.jsonl", [{"prompt": "Hi", "completion": f"c {n}"} for n in range(5)])
    }


def test_entries_without_a_measure_are_read_one_after_the_other(
    three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = prepare(tiny_tokenizer, [Source(path=path) for path in three.values()])
    alone = [prepare(tiny_tokenizer, Path(path)).train for path in three.values()]
    assert data.train.examples == [example for part in alone for example in part.examples]
    assert [source.shapes for source in data.sources] == [["text"], ["text"], ["prompt/completion"]]


def test_one_path_is_the_same_however_it_is_written(
    three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = prepare(tiny_tokenizer, Path(three["a"]), validation_fraction=0.2)
    for path in (three["a"], three["a"].replace("a.jsonl", "[a].jsonl")):
        assert prepare(tiny_tokenizer, [Source(path=path)], validation_fraction=0.2).fingerprint == plain.fingerprint


def test_weights_and_rows_make_up_the_set(three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    entries = [_source(three["a"], weight=1), _source(three["b"], weight=3), _source(three["c"], rows=12)]
    data = prepare(tiny_tokenizer, entries, seed=7)
    times = Counter(_contents(data.train))
    assert Counter(text[0] for text in times.elements()) == {"a": 20, "b": 60, "c": 12}
    assert {times[row] for row in times if row[0] == "a"} == {1}
    assert {times[row] for row in times if row[0] == "b"} == {3}
    assert sorted(times[row] for row in times if row[0] == "c") == [2, 2, 2, 3, 3]
    assert [(source.usable, source.rows) for source in data.sources] == [(60, 20), (20, 60), (5, 12)]
    assert prepare(tiny_tokenizer, entries, seed=7).fingerprint == data.fingerprint
    assert prepare(tiny_tokenizer, entries, seed=8).fingerprint != data.fingerprint


def test_a_repeated_row_is_held_out_with_all_its_repeats(
    three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    entries = [_source(three["a"], rows=30), _source(three["b"], rows=60)]
    data = prepare(tiny_tokenizer, entries, validation_fraction=0.3)
    trained, held_out = Counter(_contents(data.train)), Counter(_contents(data.validation))
    assert not set(trained) & set(held_out)
    assert len(held_out) > 0
    assert {(trained | held_out)[row] for row in trained | held_out if row[0] == "b"} == {3}


def test_an_entry_with_weight_0_is_not_read(three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepare(tiny_tokenizer, [_source(three["a"], weight=1), _source("absent.jsonl", weight=0)])
    assert len(data.train) == 60
    assert data.sources[1].sentence() == "absent.jsonl: not read, its weight is 0"


def test_validation_may_be_mixed_as_well(three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepare(tiny_tokenizer, Path(three["a"]), [_source(three["b"], rows=5), _source(three["c"], rows=1)])
    assert Counter(text[0] for text in _contents(data.validation)) == {"b": 5, "c": 1}
    assert [source.rows for source in data.validation_sources] == [5, 1]


def test_evaluation_reads_a_directory_or_a_pattern(
    three: dict[str, str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(load_evaluation(tmp_path, tiny_tokenizer, 100).dataset) == 80
    assert len(load_evaluation(f"{tmp_path}/*/*.jsonl", tiny_tokenizer, 100).dataset) == 5


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"text": "a"}, {"prompt": "b", "completion": "c"}],
            r"d/2\.jsonl:2: a row without text, in a file of text rows",
        ),
        ([{"text": "a"}, {"text": ""}], r"d/2\.jsonl:2: a text that is empty"),
        ([{"text": "word " * 200}], r"d/2\.jsonl:1: the row has \d+ tokens"),
        ([], r"d/2\.jsonl is empty"),
    ],
)
def test_an_error_in_any_file_is_told_by_file_and_line(
    three: dict[str, str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[Any], sentence: str
) -> None:
    _write(tmp_path / "d" / "1.jsonl", _texts("d", 3))
    _write(tmp_path / "d" / "2.jsonl", rows)
    with pytest.raises(InputError, match=sentence):
        prepare(tiny_tokenizer, [Source(path=three["a"]), Source(path=str(tmp_path / "d"))], max_length=100)


def test_places_are_told_file_by_file(three: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = prepare(tiny_tokenizer, [Source(path=path) for path in three.values()]).train.rows
    told = places([rows[61], rows[2], rows[60], rows[2]])
    assert told == f"lines 3 of {three['a']}; 1, 2 of {three['b']}"
