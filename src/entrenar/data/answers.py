"""Where the assistant's turns stand in a rendered conversation: what leads to each, what it says, what ends it.

Nothing is looked up by a model's name. A conversation is rendered up to a turn with the generation prompt, which is
what a server would send, and up to and with the turn, as if it were the last. What a row says must be in what is
trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from entrenar.core.errors import InputError
from entrenar.data.conversation import Conversation
from entrenar.data.spoken import check_said
from entrenar.data.turn_end import SENTINELS, AddedTokens, TurnEnd, call_end, end_of_turn, shared_size, usual_end


@dataclass(frozen=True)
class Answer:
    """A trained turn: the `prompt` that a server would send, and its `text` with the token that ends it (`end`).

    `said`: what of the text the row says, in pieces.
    """

    prompt: str
    text: str
    end: str
    said: list[str]


def find_answers(talk: Conversation, trained: Sequence[int]) -> tuple[list[Answer], str]:
    """The answers at the turns `trained`, in order, each as it is served: after what the template makes of the turns
    before it, written as the last turn. And the text that stands after the last of them in the whole.

    Raises:
        InputError: the template leaves out what a turn says, or ends it with nothing; the sentence says which.
    """
    answers, rest = list[Answer](), ""
    for index in trained:
        answer, rest = _find(talk, index)
        answers.append(answer)
    return answers, rest


def _find(talk: Conversation, index: int) -> tuple[Answer, str]:
    before, turn, whole = talk.turns[:index], talk.turns[index], talk.whole
    is_last = index + 1 == len(talk.turns)
    alone = whole if is_last else talk.render([*before, turn])
    prompt = _prompt(talk, index)
    start = _start(talk, index, prompt, alone)
    added, end = _end(talk, index, alone)
    stop = len(alone) - len(end.tail)
    said = check_said(turn, alone[start:stop], added)
    closing = end.closing
    if end.opens_next and not is_last and whole.startswith(alone[:stop]) and added.at(whole, stop):
        closing = added.at(whole, stop)  # the turn ends with what opens the next one, and that is known
    last = added.within(closing)[-1][1] if added.within(closing) else closing
    written = alone[:stop] + closing
    rest = whole[len(written) :] if whole.startswith(written) else ""
    return Answer(prompt, alone[start:stop] + closing, last, said), rest


def _prompt(talk: Conversation, index: int) -> str:
    """What a server sends for the answer at a turn."""
    try:
        return talk.render(talk.turns[:index], answer_next=True)
    except InputError as error:
        if index:
            raise
        raise InputError(
            "the assistant speaks first, and with no turn before it the prompt of its answer cannot be made "
            f"({error}): set its weight to 0, or put another turn before it"
        ) from None


def _start(talk: Conversation, index: int, prompt: str, alone: str) -> int:
    """Where the answer begins in `alone`. A prompt that opens more than the turn itself does (a thought) stands before
    the answer all the same: it is what the model is given."""
    if alone.startswith(prompt):
        return len(prompt)
    added, _ = usual_end(talk.template.tokenizer)
    shared = len(added.common_prefix(prompt, alone))
    if not prompt[shared:].strip():
        return shared
    header = _header(talk, index)
    if prompt.startswith(header) and alone.startswith(header):
        return len(header)
    unopened = shared_size(prompt, talk.render(talk.turns[:index]) if index else "")
    start = _after_opener(talk, index, prompt[unopened:], alone)
    if start:
        return start
    if shared >= unopened:
        raise InputError(
            f"the model's chat template asks for an answer with {_ending(prompt)!r}, and this answer begins "
            f"otherwise, with "
            f"{alone[shared : shared + 40]!r}: write it as the model would go on, or use another template"
        )
    raise InputError(
        "the model's chat template writes earlier turns differently once the answer follows, so what leads to it is "
        f"not in the row (it is asked for with {_ending(prompt)!r}): use turns that the template keeps as they are"
    )


def _after_opener(talk: Conversation, index: int, opener: str, alone: str) -> int:
    """Where an answer begins that the template opens as it asks for it, after turns that it writes otherwise now (the
    thought that led to a call is left out once an answer follows): after the last `opener`. 0: not opened so."""
    before = list(talk.turns[:index])
    if not opener.strip() or not before or not isinstance(before[-1].get("content"), str):
        return 0
    marked = talk.render([*before[:-1], before[-1] | {"content": SENTINELS[0]}, talk.turns[index]])
    turn = marked[marked.rfind(SENTINELS[0]) :]  # what stands before the answer's own turn, and that turn
    place = turn.find(opener)
    after = turn[place + len(opener) :]
    return len(alone) - len(after) if place > 0 and after and alone.endswith(opener + after) else 0


def _header(talk: Conversation, index: int) -> str:
    """What stands before the text of an answer at a turn, whatever it says."""
    before = list(talk.turns[:index])
    first, second = (talk.render([*before, {"role": "assistant", "content": word}]) for word in SENTINELS)
    return first[: shared_size(first, second)]


def _ending(text: str) -> str:
    return text if len(text) <= 40 else "…" + text[-40:]


def _end(talk: Conversation, index: int, alone: str) -> tuple[AddedTokens, TurnEnd]:
    added, end = usual_end(talk.template.tokenizer)
    if talk.turns[index].get("tool_calls"):
        end = call_end(talk.template.tokenizer) or end
    if end is None or not alone.endswith(end.tail):
        given = {"tools": talk.tools, "options": talk.options}
        end = end_of_turn(talk.template, added, talk.turns[:index], **given)
    if not alone.endswith(end.tail):
        raise InputError(
            f"the model's chat template ends this turn otherwise than an answer, with {_ending(alone)!r} where an "
            f"answer ends with {end.tail!r}, so what ends it cannot be told"
        )
    if not end.closing:
        raise InputError(
            "the model's chat template ends an answer with no token, and the tokenizer has no end-of-sequence token: "
            "nothing would teach the model to stop"
        )
    return added, end
