"""Whether a chat template writes what every turn says that leads to an answer; some know no system, some no tool."""

from collections.abc import Collection, Sequence

from entrenar.core.errors import InputError
from entrenar.data.conversation import Conversation, bare_text
from entrenar.data.spoken import pieces, written_forms
from entrenar.data.template import Turn
from entrenar.data.turn_end import SENTINELS, usual_end

# A text of fewer characters may stand in a template's own words by chance.
_TELLING_SIZE = 12


def check_context(talk: Conversation, trained: Collection[int]) -> None:
    """The text of every turn but those at `trained` must be written, each in a place of its own; what those say is
    looked for in their answers (`spoken.check_said`).

    Raises:
        InputError: a turn is left out, or its text is another.
    """
    text, taken = bare_text(talk.whole), list[tuple[int, int]]()
    for index in sorted(range(len(talk.turns)), key=lambda i: -len(talk.turns[i].get("content") or "")):
        turn = talk.turns[index]
        for said in [] if index in trained else _context(turn, talk):
            forms = [bare_text(form) for form in written_forms(said)]
            place = next((span for form in forms if (span := _free(text, form, taken))), None)
            taken += [place] if place else []
            is_there = place or any(form in text for form in forms)
            is_sure = place and len(forms[0]) >= _TELLING_SIZE
            if not is_there or not (is_sure or _hears(talk, index)):
                shown = said if len(said) <= 40 else said[:40] + "…"
                raise InputError(
                    f"the model's chat template leaves out or rewrites turn {index + 1}, of the role {turn['role']}: "
                    f"{shown!r} is not in the text it writes; remove the turn, or use a template that keeps it"
                )


def _context(turn: Turn, talk: Conversation) -> list[str]:
    """What of a turn must be written: its text; of an assistant what follows its last thought."""
    content = turn.get("content") or ""
    said = pieces(content, usual_end(talk.template.tokenizer)[0])
    return said[-1:] if turn["role"] == "assistant" else said


def _free(text: str, said: str, taken: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first place of a text that overlaps none that is `taken`."""
    start = text.find(said)
    while start >= 0:
        clash = next((last for first, last in taken if start < last and first < start + len(said)), None)
        if clash is None:
            return start, start + len(said)
        start = text.find(said, clash)
    return None


def _hears(talk: Conversation, index: int) -> bool:
    """Whether a word more in a turn's content is written."""
    turns = list(talk.turns)
    turns[index] = {**turns[index], "content": turns[index]["content"] + SENTINELS[0]}
    try:
        return SENTINELS[0] in talk.render(turns)
    except InputError:  # it reads what it refuses
        return True
