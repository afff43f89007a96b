"""Chat templates: the text of transformers' apply_chat_template, on a fixed day, in bounded time and size."""

import copy
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data import template as under_test
from entrenar.data.template import ChatTemplate, Turn

_TEMPLATES = sorted((Path(__file__).parents[1] / "templates").glob("*.jinja"))
_CALL = {"id": "a1", "type": "function", "function": {"name": "dim", "arguments": {"room": "<café>", "level": 30}}}
_TURNS: list[Turn] = [
    {"role": "user", "content": "Hi ñ"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "hm", "weight": None},
    {"role": "tool", "content": "{}", "name": "dim", "tool_call_id": "a1"},
    {"role": "assistant", "content": "Done."},
]
_TOOLS = [{"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}]
_ODD = (
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if m.thinking %}{% continue %}{% endif %}\n"
    "{% generation %}{{ m | tojson(indent=1) }}{{ bos_token }}{{ loop.index }}{% endgeneration %}{% endfor %}"
    "{{ dict(a=1) }}{{ tools | tojson if tools else 'none' }}{{ messages | map(attribute='role') | join(',') }}"
    "{{ x }}\n"
)


def _with(tokenizer: PreTrainedTokenizerFast, source: Any) -> ChatTemplate:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, date(2026, 11, 30))


@pytest.mark.parametrize("answer_next", [False, True])
@pytest.mark.parametrize("turns", [_TURNS[:1], _TURNS, [_TURNS[0], _TURNS[3]]], ids=["one", "tools", "two"])
@pytest.mark.parametrize("source", [*_TEMPLATES, _ODD], ids=lambda s: getattr(s, "stem", "odd"))
def test_the_text_is_that_of_transformers(
    source: Any, turns: list[Turn], answer_next: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = _with(tiny_tokenizer, source if isinstance(source, str) else source.read_text(encoding="utf-8"))
    given: dict[str, Any] = {"tools": _TOOLS if len(turns) > 2 else None}

    def theirs() -> Any:
        return template.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer_next, x="é", **given
        )

    try:
        expected = theirs()
    except Exception:
        with pytest.raises(InputError, match="refuses this conversation"):
            template.render(turns, answer_next=answer_next, tools=given["tools"] or ())
    else:
        options = {"x": "é"}
        assert template.render(turns, answer_next=answer_next, tools=given["tools"] or (), options=options) == expected


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = _with(tiny_tokenizer, {"default": "plain", "tool_use": "with tools"})
    assert (template.render(_TURNS), template.render(_TURNS, tools=_TOOLS)) == ("plain", "with tools")
    with pytest.raises(InputError, match="cannot be chosen"):
        _with(tiny_tokenizer, {"rag": "x"}).render(_TURNS)


def test_a_template_is_told_the_day_and_it_is_known_whether_it_asked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = _with(tiny_tokenizer, "{% if messages|length > 1 %}{{ strftime_now('%d %b %Y %H') }}{% endif %}")
    assert template.render(_TURNS[:1]) == ""
    assert not template.reads_clock
    assert template.render(_TURNS) == "30 Nov 2026 00"
    assert template.reads_clock


_WRONG = {
    "division by zero": "{{ 1 // (messages | length - 4) }}",
    "too large a float": "{{ 2.0 ** 99999 }}",
    "no such turn": "{{ messages[99].content }}",
    "undefined": "{{ foo.bar }}",
    "types": "{{ 1 + 'a' }}",
    "syntax": "{% for %}",
    "no such filter": "{{ 1 | nofilter }}",
    "its own words": "{{ raise_exception('no') }}",
    "a private name": "{{ ''.__class__.__mro__ }}",
    "a private name in a namespace": "{{ namespace(__x=1) }}",
    "half of a pair": "{{ '\\ud800' }}",
    "no end of calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too much memory at once": "{{ 'a' * 10 ** 11 }}",
    "too much memory in a filter": "{{ 'a' | center(10 ** 11) }}",
    "too much memory in a format": "{{ '%099999999999d' | format(1) }}",
    "random words": "{{ lipsum() }}",
}


@pytest.mark.parametrize("source", _WRONG.values(), ids=_WRONG)
def test_every_mistake_of_a_template_is_a_sentence_again_and_again(
    source: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = _with(tiny_tokenizer, source)
    messages = []
    for _ in range(2):
        with pytest.raises(InputError, match=r"the model's chat template refuses this conversation: .") as caught:
            template.render(_TURNS)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert len(messages[0]) < 400


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    worker = under_test._Worker()
    monkeypatch.setattr(under_test, "SECONDS", 0.3)
    monkeypatch.setattr(under_test, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(under_test, "_WORKER", worker)
    yield
    worker.close()


def test_a_template_that_takes_too_long_is_stopped_and_the_next_one_is_rendered(
    small_limits: None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    endless = _with(tiny_tokenizer, "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}")
    fine = _with(tiny_tokenizer, "fine")
    assert fine.render(_TURNS) == "fine"
    with pytest.raises(InputError, match="takes more than"):
        endless.render(_TURNS)
    assert fine.render(_TURNS) == "fine"
    started = time.monotonic()
    for _ in range(20):
        with pytest.raises(InputError, match="takes more than"):
            endless.render(_TURNS)
    assert time.monotonic() - started < 0.3, "what is known to have no end is not tried again"


def test_a_template_that_writes_too_much_is_stopped(
    small_limits: None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(_with(tiny_tokenizer, "{{ 'x' * 1000 }}").render(_TURNS)) == 1000
    with pytest.raises(InputError, match="writes more than 1,000 characters"):
        _with(tiny_tokenizer, "{% for a in range(11) %}{{ 'x' * 100 }}{% endfor %}").render(_TURNS)


def test_a_process_that_has_died_is_started_again(small_limits: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = _with(tiny_tokenizer, "{{ messages | length }}")
    assert template.render(_TURNS) == "4"
    process = under_test._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render(_TURNS) == "4"


@pytest.mark.parametrize(
    ("source", "name", "is_read"),
    [
        ("{% if enable_thinking %}", "enable_thinking", True),
        ("{% if enable_thinking %}", "thinking", False),
        ("{{ m['end'] }}{% endif %}", "end", True),
        ("{{ m.content }}{% endif %}", "end", False),
        ("{{ m.a-1 }}", "a-1", True),
    ],
)
def test_a_name_is_read_where_it_stands_as_a_word(source: str, name: str, is_read: bool) -> None:
    tokenizer: Any = SimpleNamespace(chat_template=source, get_chat_template=lambda tools: source)
    assert ChatTemplate(tokenizer).reads(name) is is_read
