"""An adapter remembers the ids that it was trained on: what makes others is refused, with the first difference."""

import json
import logging
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from entrenar.cli.app import app
from entrenar.core import notices
from entrenar.core.errors import InputError
from entrenar.data.feed import FEED_NAME, PROBE_TEXT, PROBE_TURNS
from entrenar.opening.adapted import open_model
from entrenar.recipes.evaluate import evaluate
from entrenar.recipes.export import export
from entrenar.recipes.train import train

MakeConfig = Callable[..., Path]


@pytest.fixture
def adapter(make_config: MakeConfig) -> Path:
    return Path(train(make_config(**{"training.epochs": 1})).adapter)


@pytest.fixture
def other(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The same model in a directory whose files are to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))


def ids(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], **options: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(turns, return_dict=True, **options)
    return encoded["input_ids"]


def test_the_file_says_what_transformers_makes_of_the_probe(adapter: Path, tiny_model_dir: Path) -> None:
    feed = json.loads((adapter / FEED_NAME).read_text(encoding="utf-8"))
    theirs = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert feed["rows"] == "conversations"
    assert feed["template"] == theirs.chat_template
    assert feed["template_options"] == {}
    assert feed["date"] is None
    assert feed["stops"] == [2]
    assert feed["special_tokens"]["eos_token"] == {"text": "<|im_end|>", "id": 2}
    turns = list(PROBE_TURNS)
    assert feed["probe"] == {
        "text": PROBE_TEXT, "text_ids": theirs(PROBE_TEXT)["input_ids"], "turns": turns,
        "turns_ids": ids(theirs, turns), "prompt_ids": ids(theirs, turns[:-1], add_generation_prompt=True),
    }  # fmt: skip


def _swap(directory: Path, one: str, two: str) -> None:
    """Two entries of the vocabulary change places."""
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    vocab = state["model"]["vocab"]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(state), encoding="utf-8")


def _new_split(directory: Path) -> None:
    """Digits are no longer tokens of their own: what a change of a tokenizer's class does."""
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(state), encoding="utf-8")


def _template(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "chat_template.jinja"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


_ALWAYS = "{{ raise_exception('never') }}"
_CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a token": (lambda directory: _swap(directory, "T", "q"), "text, after '', token 1 and on were 54, .* are 83,"),
    "a split": (_new_split, "of the probe's text, after '', token 1 and on were"),
    "a template": (
        _template(lambda text: text.replace("+ message['content']", "+ message['content'] + '!'")),
        "of the probe's conversation, after '.*no', token",
    ),
    "an opening of answers": (
        _template(lambda text: text.replace("assistant\n'", "assistant'")), "of the probe's prompt, after .* are none",
    ),
    "a refusal": (_template(lambda text: _ALWAYS), "the chat template wrote it, and now refuses it .*never"),
}  # fmt: skip


@pytest.mark.parametrize("kind", _CHANGES)
def test_a_tokenizer_that_makes_other_ids_is_refused_wherever_the_adapter_is_used(
    adapter: Path, other: Path, tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    change, sentence = _CHANGES[kind]
    change(other)
    model, laid = str(other), str(adapter)
    uses: list[Callable[[], object]] = [
        lambda: open_model(model, laid),
        lambda: evaluate(model, tiny_data, adapter=laid),
        lambda: export(model, tmp_path / "out", adapter=laid),
        lambda: export(model, tmp_path / "out.gguf", adapter=laid, to="gguf"),
        lambda: export(model, tmp_path / "out.gguf", adapter=laid, to="gguf-adapter", ollama=True),
    ]
    for use in uses:
        with pytest.raises(InputError, match=f"makes other tokens than .* was trained on: .*{sentence}"):
            use()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", "Modelfile"))]
    told = CliRunner().invoke(app, ["generate", model, "--prompt", "Please", "--adapter", laid])
    assert isinstance(told.exception, InputError)


def test_a_special_token_that_moved_is_refused_by_name(adapter: Path, tiny_model_dir: Path) -> None:
    _edit(adapter, lambda feed: feed["special_tokens"]["eos_token"].update(id=9))
    with pytest.raises(InputError, match=r"its eos_token '<\|im_end\|>' was token 9 and is 2"):
        open_model(str(tiny_model_dir), str(adapter))
    _edit(adapter, lambda feed: feed["special_tokens"]["eos_token"].update(text="<gone>"))
    with pytest.raises(InputError, match="its eos_token '<gone>' was token 9 and is none"):
        open_model(str(tiny_model_dir), str(adapter))


def test_the_versions_of_the_training_are_told_where_ids_differ(adapter: Path, other: Path) -> None:
    _edit(adapter, lambda feed: feed["versions"].update(transformers="4.0.0"))
    open_model(str(other), str(adapter))
    _new_split(other)
    with pytest.raises(InputError, match=r"trained on \(trained with transformers 4\.0\.0, here "):
        open_model(str(other), str(adapter))


def test_another_text_of_the_template_with_the_same_ids_is_said(
    adapter: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _template(lambda text: "{# mended #}" + text)(other)
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "entrenar"):
        open_model(str(other), str(adapter))
    [told] = [record.getMessage() for record in caplog.records]
    assert "is not written as the one that" in told


def test_a_template_that_writes_the_day_is_the_same_on_another(
    make_config: MakeConfig, other: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _template(lambda text: "{{ strftime_now('%d %b %Y') }}" + text)(other)
    adapter = Path(train(make_config(**{"model.path": str(other), "training.epochs": 1})).adapter)
    feed = json.loads((adapter / FEED_NAME).read_text(encoding="utf-8"))
    assert feed["date"] == date.today().isoformat()

    class _Later(date):
        @classmethod
        def today(cls) -> "date":
            return date(2031, 5, 6)

    monkeypatch.setattr("entrenar.data.turn_end.date", _Later)
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "entrenar"):
        open_model(str(other), str(adapter))
    assert caplog.records == []


def test_variables_of_the_template_stay_with_the_adapter(
    make_config: MakeConfig, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _template(lambda text: text + "{% if add_generation_prompt and terse %}yes {% endif %}")(other)
    changes = {"model.path": str(other), "training.epochs": 1, "data.template": {"terse": False}}
    adapter = Path(train(make_config(**changes)).adapter)
    _edit(adapter, lambda feed: feed.update(template_options={"terse": True}))
    with pytest.raises(InputError, match="of the probe's prompt, after "):
        open_model(str(other), str(adapter))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("entrenar.evaluation.generate.generate", lambda *_, **given: asked.append(given) or [""])
    _edit(adapter, lambda feed: feed.update(template_options={"terse": False}))
    command = ["generate", str(other), "--prompt", "Please", "--adapter", str(adapter)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert asked[0]["options"] == {"terse": False}


def test_an_adapter_of_plain_text_does_not_ask_for_the_template(
    make_config: MakeConfig, other: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"lamp {n}"}) + "\n" for n in range(24)), encoding="utf-8")
    changes = {"data.train": str(path), "data.validation_fraction": 0.0, "eval.every_steps": None}
    adapter = Path(train(make_config(**changes, **{"training.epochs": 1})).adapter)
    feed = json.loads((adapter / FEED_NAME).read_text(encoding="utf-8"))
    assert (feed["rows"], feed["template"], feed["probe"]["turns_ids"]) == ("text", None, None)
    _template(lambda text: _ALWAYS)(other)
    open_model(str(other), str(adapter))
    _new_split(other)
    with pytest.raises(InputError, match="of the probe's text"):
        open_model(str(other), str(adapter))


def test_new_tokens_are_compared_by_the_tokenizer_beside_the_adapter(
    make_config: MakeConfig, tiny_model_dir: Path
) -> None:
    config = make_config(**{"lora.new_tokens": ["<tool>"], "training.epochs": 1})
    adapter = Path(train(config).adapter)
    open_model(str(tiny_model_dir), str(adapter))
    _swap(adapter, "T", "q")
    with pytest.raises(InputError, match="of the probe's text"):
        open_model(str(tiny_model_dir), str(adapter))


def test_without_the_file_nothing_is_compared(adapter: Path, other: Path) -> None:
    (adapter / FEED_NAME).unlink()
    _new_split(other)
    open_model(str(other), str(adapter))


def _edit(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    feed = json.loads((adapter / FEED_NAME).read_text(encoding="utf-8"))
    change(feed)
    (adapter / FEED_NAME).write_text(json.dumps(feed), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda feed: feed.pop("probe"), "the key 'probe' is missing"),
        (lambda feed: feed["probe"].update(text_ids="12"), "'probe.text_ids' is '12' but"),
        (lambda feed: feed.update(date="yesterday"), "the date 'yesterday' is none"),
        (lambda feed: feed.update(rows="images"), "'rows' is 'images' but"),
        (lambda feed: feed.update(stops=[None]), "'stops.0' is None but"),
    ],
)
def test_a_broken_file_is_one_sentence(
    adapter: Path, tiny_model_dir: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    _edit(adapter, change)
    with pytest.raises(InputError, match=f"{sentence}.*or remove it"):
        open_model(str(tiny_model_dir), str(adapter))


def test_a_file_cut_short_is_one_sentence(adapter: Path, tiny_model_dir: Path) -> None:
    path = adapter / FEED_NAME
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"entrenar_feed\.json: not JSON .*or remove it"):
        open_model(str(tiny_model_dir), str(adapter))
