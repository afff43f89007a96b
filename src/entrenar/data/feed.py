"""How a model was fed while an adapter was trained: `entrenar_feed.json`, a file of the adapter's directory.

An adapter fits the token ids that it saw. Another version of a library, a mended tokenizer or another chat template may
make other ids of the same text, without a word (transformers#48967). So the file holds a fixed probe, a text and a
conversation, with the ids that training made of them; whoever opens the adapter makes them again and compares.
"""

import contextlib
import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from entrenar.core.documents import read_json
from entrenar.core.errors import InputError
from entrenar.data.dataset import EVALUATION_DAY, read_date
from entrenar.data.template import ChatTemplate
from entrenar.data.turn_end import end_ids, template_of

FEED_NAME = "entrenar_feed.json"
PROBE_TEXT = (
    "The 3 quick foxes can't jump 1,234.56 m, and SHE'LL see (at 7:45) 100% of it!\n\n"
    "\tdef area(w): return w ** 2  # ok\nSüden, żółć, Straße. Привет, ΑΒΓδ!\n"
    "日本語のテスト、漢字 한국어 हिन्दी العربية עברית ไทย\n"
    "  two  blanks   three, ½ ２３ 🙂 2024-12-31"
)
PROBE_TURNS = (
    {"role": "user", "content": "Is 12:30 in Kraków later than 9:05?\n\n- yes\n- no"},
    {"role": "assistant", "content": "Yes, by 3 hours\nand 25 minutes."},
    {"role": "user", "content": "Спасибо! And 24 × 7?"},
    {"role": "assistant", "content": "168"},
)
_VERSIONS = ("transformers", "tokenizers")
_SHOWN = 3  # ids on each side of a difference


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A token with a part to play, and its id."""

    text: str
    id: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Texts and the ids that the tokenizer made of them.

    `turns_ids`: of the conversation as the chat template writes it; `prompt_ids`: of all but its last turn, with an
    answer opened; of either the template's refusal, where it refuses; None where no template was used.
    """

    text: str
    text_ids: list[int]
    turns: list[dict[str, str]]
    turns_ids: list[int] | str | None = None
    prompt_ids: list[int] | str | None = None


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What `entrenar_feed.json` says.

    Attributes:
        rows: of conversations, which a chat template wrote, or of plain text.
        template: the chat template's text; `template_options`: variables that it was given beside those of the rows.
        date: the day that it was told, if it asked; the probe is written on that day, or on a fixed one.
        special_tokens: transformers' name (`eos_token`) → token.
        stops: every token that generation stops at.
        versions: of the libraries that made the ids.
    """

    rows: Literal["conversations", "text"]
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    special_tokens: dict[str, SpecialToken]
    stops: list[int]
    probe: Probe
    versions: dict[str, str] = field(default_factory=dict)


def feed_of(template: ChatTemplate, *, is_chat: bool, date: str | None = None) -> Feed:
    """What is to be remembered of a template and its tokenizer.

    Args:
        is_chat: the rows were conversations. date: the day that the template was told, None: it did not ask.
    """
    tokenizer = template.tokenizer
    probe = Probe(text=PROBE_TEXT, text_ids=[], turns=list(PROBE_TURNS))
    return Feed(
        rows="conversations" if is_chat else "text",
        template=_text_of(template) if is_chat else None,
        template_options=dict(template.options) if is_chat else {},
        date=date,
        special_tokens=_special_tokens(tokenizer),
        stops=end_ids(tokenizer, template.ends),
        probe=_probed(probe, _on_day(template, date), is_chat=is_chat),
        versions={name: version(name) for name in _VERSIONS},
    )


def write_feed(directory: Path, feed: Feed) -> None:
    """Write the file into a directory."""
    text = json.dumps(asdict(feed), indent=1, ensure_ascii=False) + "\n"
    (directory / FEED_NAME).write_text(text, encoding="utf-8")


def read_feed(directory: Path) -> Feed | None:
    """What the file of an adapter's directory says; None where there is none, as peft writes no such file.

    Raises:
        InputError: it is broken.
    """
    if not (directory / FEED_NAME).exists():
        return None
    try:
        feed = read_json(directory / FEED_NAME, "record of how the adapter was fed", Feed)
        if feed.date:
            read_date(feed.date)
    except InputError as error:
        raise InputError(
            f"{error}; take the file from where the adapter is whole, or remove it, and the adapter is not checked"
        ) from None
    return feed


def difference(feed: Feed, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first thing of which the tokenizer makes other ids than training did, in words; None: the ids are the same.

    White space, letters and conversations stand in the probe, so not every difference between two tokenizers shows.
    """
    vocabulary = tokenizer.get_vocab()
    for name, token in feed.special_tokens.items():
        now = vocabulary.get(token.text)
        if now != token.id:
            return f"its {name} {token.text!r} was token {token.id} and is {'none' if now is None else now}"
    is_chat = feed.rows == "conversations"
    template = _on_day(template_of(tokenizer, options=feed.template_options), feed.date)
    now, before = _probed(feed.probe, template, is_chat=is_chat), feed.probe
    return (
        _other_ids("text", before.text_ids, now.text_ids, tokenizer)
        or _other_ids("conversation", before.turns_ids, now.turns_ids, tokenizer)
        or _other_ids("prompt", before.prompt_ids, now.prompt_ids, tokenizer)
    )


def has_other_text(feed: Feed, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is written otherwise than the one that was used."""
    return feed.template is not None and _text_of(template_of(tokenizer)) != feed.template


def other_versions(feed: Feed) -> list[str]:
    """Libraries that have another version here than in training, in words."""
    known = {name: version(name) for name in _VERSIONS if name in feed.versions}
    return [f"{name} {feed.versions[name]}, here {now}" for name, now in known.items() if feed.versions[name] != now]


def _text_of(template: ChatTemplate) -> str | None:
    """None where the tokenizer has none, or several of which rows choose."""
    with contextlib.suppress(InputError):
        return template.source()
    return None


def _on_day(template: ChatTemplate, date: str | None) -> ChatTemplate:
    day: datetime.date = read_date(date or EVALUATION_DAY)
    return replace(template, day=day)


def _probed(probe: Probe, template: ChatTemplate, *, is_chat: bool) -> Probe:
    """The probe with the ids of today."""
    tokenizer = template.tokenizer
    plain: Any = tokenizer(probe.text, return_attention_mask=False)["input_ids"]
    if not is_chat:
        return replace(probe, text_ids=list(plain))
    return replace(
        probe,
        text_ids=list(plain),
        turns_ids=_rendered_ids(template, probe.turns, answer_next=False),
        prompt_ids=_rendered_ids(template, probe.turns[:-1], answer_next=True),
    )


def _rendered_ids(template: ChatTemplate, turns: Sequence[dict[str, str]], *, answer_next: bool) -> list[int] | str:
    try:
        text = template.render(turns, answer_next=answer_next)
    except InputError as error:
        return str(error)
    encoded: Any = template.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return list(encoded)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, SpecialToken]:
    named = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if not isinstance(text, list)}
    vocabulary = tokenizer.get_vocab()
    return {name: SpecialToken(text=text, id=vocabulary[text]) for name, text in named.items() if text in vocabulary}


def _other_ids(
    part: str, before: list[int] | str | None, now: list[int] | str | None, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Where two lists of ids part; two refusals are one, whatever their words."""
    if isinstance(before, str) or isinstance(now, str):
        if isinstance(before, str) and isinstance(now, str):
            return None
        ways = "refused it, and now writes it" if isinstance(before, str) else "wrote it, and now refuses it"
        return f"of the probe's {part}: the chat template {ways} ({before if isinstance(before, str) else now})"
    if before == now:
        return None
    known, new = before or [], now or []
    place = next((i for i, pair in enumerate(zip(known, new, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(known), len(new)) if place is None else place
    after = str(tokenizer.decode(new[max(place - 4, 0) : place], skip_special_tokens=False))
    return (
        f"of the probe's {part}, after {after!r}, token {place + 1} and on were {_shown(known[place:])} and are "
        f"{_shown(new[place:])}"
    )


def _shown(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN])) or "none"
    return f"{shown}, …" if len(ids) > _SHOWN else shown
