"""From files to splits of encoded rows: the length policy, the seeded split, what was left out, the fingerprint."""

import copy
import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data import dataset as under_test
from entrenar.data.dataset import Dataset, PreparedData, load_dataset, load_evaluation, prepare

_SHORT, _LONG = {"prompt": "Hi", "completion": "on"}, {"prompt": "Hi", "completion": "on " * 60}


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def _contents(dataset: Dataset | None) -> set[str]:
    return {row.text for row in dataset.rows} if dataset else set()


def _held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], fraction: float, seed: int = 0
) -> set[str]:
    data = prepare(tokenizer, _write(tmp_path / "data.jsonl", rows), validation_fraction=fraction, seed=seed)
    assert _contents(data.train) | _contents(data.validation) == {row["text"] for row in rows}
    assert not _contents(data.train) & _contents(data.validation)
    return _contents(data.validation)


def test_without_a_split_all_rows_train_in_the_order_of_the_file(
    tiny_data: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = prepare(tiny_tokenizer, tiny_data)
    assert data.sources[0].shapes == ["prompt/completion"]
    assert [example.line for example in data.train.examples] == [row.line for row in data.train.rows]
    assert [example.line for example in data.train.examples] == list(range(1, 25))
    assert (data.validation, data.rejected, data.truncated) == (None, [], 0)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_split_has_about_the_asked_fraction(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, fraction: float
) -> None:
    """Within five standard deviations of a binomial draw."""
    count = 2000
    held_out = _held_out(tmp_path, tiny_tokenizer, _texts(count), fraction)
    assert abs(len(held_out) - fraction * count) < 5 * (fraction * (1 - fraction) * count) ** 0.5


def test_a_row_keeps_its_side_when_others_come_go_and_move(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = _texts(200)
    before = _held_out(tmp_path, tiny_tokenizer, rows, 0.25)
    more = rows[:150] + _texts(100, start=1000)
    random.Random(0).shuffle(more)
    after = _held_out(tmp_path, tiny_tokenizer, more, 0.25)
    kept = {row["text"] for row in rows[:150]}
    assert before & kept == after & kept
    assert 0 < len(before & kept) < 150


def test_a_larger_fraction_keeps_what_a_smaller_one_held_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    small, large = (_held_out(tmp_path, tiny_tokenizer, _texts(200), fraction) for fraction in (0.1, 0.3))
    assert small < large


def test_another_seed_holds_out_other_rows(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, again = (_held_out(tmp_path, tiny_tokenizer, _texts(200), 0.25, seed) for seed in (1, 2, 1))
    assert first == again
    assert first != second


def test_equal_rows_are_on_one_side(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """What is held out is never also trained on."""
    held_out = _held_out(tmp_path, tiny_tokenizer, _texts(100) * 3, 0.3)
    assert held_out


def test_conversations_are_split_by_all_their_turns(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "same", "completion": f"answer {number}"} for number in range(200)]
    data = prepare(tiny_tokenizer, _write(tmp_path / "data.jsonl", rows), validation_fraction=0.25)
    assert data.validation is not None
    assert 20 < len(data.validation) < 80
    assert len(data.validation) + len(data.train) == 200


def test_a_validation_file_is_used_whole_and_takes_nothing_from_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    train = _write(tmp_path / "train.jsonl", _texts(40))
    validation = _write(tmp_path / "validation.jsonl", _texts(10, start=100))
    data = prepare(tiny_tokenizer, train, validation, validation_fraction=0.5)
    assert _contents(data.train) == {row["text"] for row in _texts(40)}
    assert _contents(data.validation) == {row["text"] for row in _texts(10, start=100)}


def _prepare(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **options: Any
) -> PreparedData:
    return prepare(tokenizer, _write(tmp_path / "data.jsonl", rows), **options)


def _lengths(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    [short, long] = _prepare(tmp_path, tokenizer, [_SHORT, _LONG]).train.examples
    assert len(short) < len(long)
    return len(short), len(long)


def test_a_row_that_is_too_long_is_an_error_with_its_line_and_length(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    _, long = _lengths(tmp_path, tiny_tokenizer)
    _prepare(tmp_path, tiny_tokenizer, [_SHORT, _LONG], max_length=long)
    with pytest.raises(InputError, match=rf"data\.jsonl:2: the row has {long} tokens, data\.max_length is {long - 1}"):
        _prepare(tmp_path, tiny_tokenizer, [_SHORT, _LONG], max_length=long - 1)


def test_a_row_that_is_too_long_is_cut_and_counted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = _prepare(tmp_path, tiny_tokenizer, [_SHORT, _LONG, _LONG]).train.examples
    limit = len(whole[1]) - 2
    data = _prepare(tmp_path, tiny_tokenizer, [_SHORT, _LONG, _LONG], max_length=limit, too_long="truncate")
    assert data.truncated == 2
    assert data.rejected == []
    assert data.train.examples[0] == whole[0]
    for cut, full in zip(data.train.examples[1:], whole[1:], strict=True):
        assert (cut.ids, cut.trained, cut.line) == (full.ids[:limit], full.trained[:limit], full.line)


def test_a_row_that_is_too_long_is_dropped_and_told(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    short, _ = _lengths(tmp_path, tiny_tokenizer)
    data = _prepare(tmp_path, tiny_tokenizer, [_LONG, _SHORT, _LONG], max_length=short, too_long="drop")
    assert [row.line for row in data.train.rows] == [example.line for example in data.train.examples] == [2]
    assert [(row.line, row.reason) for row in data.rejected] == [
        (line, f"longer than max_length {short}, dropped") for line in (1, 3)
    ]
    assert data.truncated == 0


def test_a_row_whose_answer_was_cut_away_is_reported(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    short, _ = _lengths(tmp_path, tiny_tokenizer)
    wordy = {"prompt": "Please " * 100, "completion": "on"}
    data = _prepare(tmp_path, tiny_tokenizer, [wordy, _SHORT], max_length=short, too_long="truncate")
    assert [row.line for row in data.train.rows] == [2]
    assert [(row.line, row.reason) for row in data.rejected] == [(1, "no token to train on within max_length")]


def test_a_file_that_leaves_nothing_to_train_on_is_an_error(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="leaves no row to train on"):
        _prepare(tmp_path, tiny_tokenizer, [_LONG], max_length=8, too_long="drop")
    with pytest.raises(InputError, match="leaves no row to train on"):
        _prepare(tmp_path, tiny_tokenizer, [_SHORT], validation_fraction=1.0)


def test_the_validation_file_obeys_the_length_policy_under_its_own_name(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    short, _ = _lengths(tmp_path, tiny_tokenizer)
    train = _write(tmp_path / "train.jsonl", [_SHORT])
    validation = _write(tmp_path / "validation.jsonl", [_SHORT, _LONG])
    with pytest.raises(InputError, match=r"validation\.jsonl:2: the row has"):
        prepare(tiny_tokenizer, train, validation, max_length=short)
    data = prepare(tiny_tokenizer, train, validation, max_length=short, too_long="drop")
    assert [(row.file, row.line) for row in data.rejected] == [(str(validation), 2)]


def test_bad_rows_within_the_allowance_are_reported_by_file(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = _prepare(tmp_path, tiny_tokenizer, [*_texts(99), {"text": ""}])
    assert len(data.train) == 99
    assert [(row.file, row.line) for row in data.rejected] == [(str(tmp_path / "data.jsonl"), 100)]


def test_a_conversation_the_template_refuses_is_named_by_file_and_line(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('no ' + messages[0].content) }}"
    with pytest.raises(InputError, match=r"data\.jsonl:1: the model's chat template refuses this conversation: no bye"):
        _prepare(tmp_path, strict, [{"prompt": "bye", "completion": "on"}])


def test_the_fingerprint_is_that_of_the_tokens_and_the_split(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = _texts(20)
    prints = [
        _prepare(tmp_path, tiny_tokenizer, rows).fingerprint,
        _prepare(tmp_path, tiny_tokenizer, rows[::-1]).fingerprint,
        _prepare(tmp_path, tiny_tokenizer, rows[1:]).fingerprint,
        _prepare(tmp_path, tiny_tokenizer, rows, validation_fraction=0.5).fingerprint,
        _prepare(tmp_path, tiny_tokenizer, rows, max_length=3, too_long="truncate").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert _prepare(tmp_path, tiny_tokenizer, rows).fingerprint == prints[0]


def test_a_file_for_evaluation_must_fit(tiny_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load_dataset(tiny_data, tiny_tokenizer, max_length=512)
    assert len(dataset) == 24
    with pytest.raises(InputError, match=r"train\.jsonl:1: the row has"):
        load_dataset(tiny_data, tiny_tokenizer, max_length=8)


def _with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


_DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Clock(datetime.date):
    """A day of the test's own."""

    now = datetime.date(2026, 11, 30)

    @classmethod
    def today(cls) -> Any:
        return cls.now


def test_the_day_that_a_template_writes_is_today_or_the_one_that_is_given(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = _with_template(tiny_tokenizer, _DATED)
    monkeypatch.setattr("entrenar.data.turn_end.date", _Clock)
    first = _prepare(tmp_path, dated, [_SHORT])
    assert first.date == "2026-11-30"
    assert str(dated.decode(first.train.examples[0].ids)).startswith("30 Nov 2026")
    monkeypatch.setattr(_Clock, "now", datetime.date(2026, 12, 1))
    later = _prepare(tmp_path, dated, [_SHORT])
    assert (later.date, later.fingerprint == first.fingerprint) == ("2026-12-01", False)
    assert _prepare(tmp_path, dated, [_SHORT], date="2026-11-30").fingerprint == first.fingerprint
    assert _prepare(tmp_path, tiny_tokenizer, [_SHORT]).date is None
    with pytest.raises(InputError, match="write it as 2026-11-30"):
        _prepare(tmp_path, dated, [_SHORT], date="yesterday")


def test_what_is_measured_does_not_change_with_the_day(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated, path = _with_template(tiny_tokenizer, _DATED), _write(tmp_path / "data.jsonl", [_SHORT])
    monkeypatch.setattr("entrenar.data.turn_end.date", _Clock)
    first = load_evaluation(path, dated, 512)
    monkeypatch.setattr(_Clock, "now", datetime.date(2026, 12, 1))
    assert load_evaluation(path, dated, 512) == first
    assert first.date == under_test.EVALUATION_DAY
    assert load_evaluation(path, dated, 512, date="2026-12-01").dataset != first.dataset
    assert load_evaluation(path, tiny_tokenizer, 512).date is None


_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _conversation(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "Hi"} for role in roles]}


@pytest.mark.parametrize("split", [0.0, 0.5])
def test_rows_that_the_template_refuses_count_with_those_that_cannot_be_read(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, split: float
) -> None:
    strict, good = _with_template(tiny_tokenizer, _ALTERNATING), _conversation("user", "assistant")
    refused, unread = _conversation("user", "user", "assistant"), _conversation("user")
    data = _prepare(tmp_path, strict, [good] * 150 + [refused] + [good] * 48 + [unread], validation_fraction=0.0)
    assert len(data.train) == 198
    assert [row.line for row in data.rejected] == [151, 200]
    assert "must alternate" in data.rejected[0].reason
    rows = [good] * 100 + [unread] + [good] * 97 + [refused] * 2
    with pytest.raises(
        InputError, match=r"data\.jsonl:101: no assistant turn.*; 3 of 200 rows are unusable, more than 1%"
    ):
        _prepare(tmp_path, strict, rows, validation_fraction=split)


def test_columns_and_turns_that_are_not_used_are_told(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "Hi", "id": 4, "lang": "en", "end": "now"},
        {"role": "assistant", "content": "<|im_end|>"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Yes."},
    ]
    reads = _with_template(tiny_tokenizer, f"{{# lang #}}{tiny_tokenizer.chat_template}")
    data = _prepare(tmp_path, reads, [{"messages": turns, "source": "web"}])
    assert data.unused == ["source", "messages.end", "messages.id"]
    assert data.silent_turns == 1


def test_rows_left_out_of_a_measurement_are_told(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = _write(tmp_path / "data.jsonl", [_SHORT] * 99 + [{"prompt": "Hi", "completion": ""}, _LONG])
    with pytest.raises(InputError, match=r"data\.jsonl:101: the row has \d+ tokens, the limit is 60: use --max-length"):
        load_evaluation(path, tiny_tokenizer, 60, remedy="use --max-length")
    read = load_evaluation(path, tiny_tokenizer, 60, "drop")
    assert [(row.line, len(read.dataset)) for row in read.rejected] == [(100, 99), (101, 99)]
    cut = load_evaluation(path, tiny_tokenizer, 60, "truncate")
    assert (len(cut.dataset), cut.truncated) == (100, 1)
    assert [example.answer is None for example in cut.dataset.examples] == [False] * 99 + [True]
