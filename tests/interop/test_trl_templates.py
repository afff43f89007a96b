"""The chat templates that TRL ships: every answer is trained as it is served, or refused as the template refuses it.

The template itself says what is right: before an answer stands what it makes of the turns before, with the generation
prompt; then the turn as it writes it last. What ends an answer, and what stands before a first one, is written by hand
for each family. Where TRL marks what the assistant says (`{% generation %}`), transformers' mask is a
second one. TRL itself is not imported: only its files are read.
"""

import copy
import json
import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data.encode import Example, encode
from entrenar.data.rows import Row
from entrenar.data.turn_end import end_ids

pytestmark = pytest.mark.interop

_SPEC = find_spec("trl")
_FILES = sorted((Path(str(_SPEC.origin)).parent / "chat_templates").glob("*.jinja")) if _SPEC else []
_MARKUP = re.compile(r"<[|｜][^<>{}'\"\s]+?[|｜]>|</?[a-z_]+\|?>|<\|[a-z_]+>|\[/?[A-Z_]+\]")
_THOUGHT = "<think>\n\n</think>\n\n"
# Beginning of a file's name (the longest counts) → what stands before a first answer, the end of sequence, what ends a
# turn where it is another, and a turn that calls a tool. As the families' own files have them.
_FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", "", ""),
    "cohere2": ("", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ""),
    "deepseek": ("", "<｜end▁of▁sentence｜>", "", ""),
    "diffusion_gemma": ("", "<turn|>", "", "<|tool_response>"),
    "gemma": ("", "<eos>", "<end_of_turn>", ""),
    "gemma4": ("", "<turn|>", "", "<|tool_response>"),
    "gemma4_v2": ("", "<turn|>", "", ""),
    "glm4moe": ("\n<think></think>\n", "<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|channel|>final<|message|>", "<|return|>", "", "<|call|>"),
    "idefics3": (" ", "<end_of_utterance>", "", ""),
    "lfm2": ("", "<|im_end|>", "", ""),
    "llama3": ("", "<|eot_id|>", "", ""),
    "llava_next": (" ", "</s>", "", ""),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>", "", ""),
    "nemotron_3": ("</think>", "<|im_end|>", "", ""),
    "phi3": ("", "<|endoftext|>", "<|end|>", ""),
    "qwen2_5": ("", "<|im_end|>", "", ""),
    "qwen3": (_THOUGHT, "<|im_end|>", "", ""),
    "qwen3_instruct": ("", "<|im_end|>", "", ""),
    "qwen3_vl": ("", "<|im_end|>", "", ""),
    "qwen3_5_nothink": ("", "<|im_end|>", "", ""),
    "qwen3_5_think": ("\n</think>\n\n", "<|im_end|>", "", ""),
    "qwen3_6": ("\n</think>\n\n", "<|im_end|>", "", ""),
    "qwen3_8": ("\n</think>\n\n", "<|im_end|>", "", ""),
    "smolvlm": (" ", "<end_of_utterance>", "", ""),
}
_QUESTION, _ANSWER = {"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue sky."}
_QUESTIONS = ("What colour?", "And grass?", "And the sea?", "And snow?")
_ANSWERS = ("Blue sky.", "Green one.", "Grey water.", "White all over.")
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
# They ask for an answer with an empty thought, so an answer with a thought is none that is asked for.
_NO_THOUGHTS = ("qwen3_5_nothink", "qwen3_5_nothink_training")


def _conversation(kind: str, count: int) -> tuple[list[dict[str, Any]], list[Any]]:
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be terse."}] if kind in ("system", "all") else []
    thinks, calls = kind in ("reasoning", "all"), kind in ("tools", "all")
    for question, answer in zip(_QUESTIONS[:count], _ANSWERS, strict=False):
        thought = {"reasoning_content": f"I think of {question}"} if thinks else {}
        turns.append({"role": "user", "content": question})
        if calls:
            function = {"name": "weather", "arguments": {"city": answer.split()[0]}}
            call = {"id": "call00001", "type": "function", "function": function}
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]} | thought)
            turns.append({"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"})
        turns.append({"role": "assistant", "content": answer} | thought)
    return turns, [_TOOL] if calls else []


def _family(path: Path) -> tuple[str, str, str, str]:
    return _FAMILIES[max((name for name in _FAMILIES if path.stem.startswith(name)), key=len)]


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Bytes, newlines in one token as Llama 3's and Qwen's have them, and every tag of the template as a token."""
    source = path.read_text(encoding="utf-8")
    _, eos, end, call = _family(path)
    tags = {*_MARKUP.findall(source), *_MARKUP.findall(eos + end + call), "<|user|>", "<|assistant|>", "<|system|>"}
    backend = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+|\S+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=["<s>", *sorted(tags)], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["a\n\nb\n\nc\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = source
    return tokenizer


def _trained(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    ids = [index for index, flag in zip(example.ids, example.trained, strict=True) if flag]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _in_parts(turns: list[dict[str, Any]], example: Example, tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """The turns as this template reads them: some read content as parts only."""
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    as_text = tokenizer.decode(example.ids)
    try:
        whole: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:
        return parts
    return turns if "Blue sky." in whole and "Blue sky." in str(as_text) else parts


def test_trl_is_there() -> None:
    assert len(_FILES) > 50, "run `make interop`, which fetches TRL's files"


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_one_answer_is_trained_with_its_end_after_the_prompt_that_is_served(path: Path) -> None:
    before, eos, end, _ = _family(path)
    tokenizer = _tokenizer(path)
    example = encode(Row(1, (_QUESTION, _ANSWER)), tokenizer)
    assert _trained(example, tokenizer) == before + "Blue sky." + (end or eos)
    assert example.answer is not None
    start, stop = example.answer
    assert example.ids[stop - 1] in end_ids(tokenizer)
    question = _in_parts([_QUESTION, _ANSWER], example, tokenizer)[:1]
    served: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert example.ids[:start] == served


@pytest.mark.parametrize("kind", ["plain", "system", "tools", "reasoning", "all"])
@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_every_answer_is_trained_as_it_is_served(path: Path, kind: str) -> None:
    tokenizer = _tokenizer(path)
    for count in (1, 2, 4):
        turns, tools = _conversation(kind, count)
        try:
            example = encode(Row(1, tuple(turns), tools=tuple(tools)), tokenizer)
        except InputError as error:
            _check_refusal(str(error), turns, tools, tokenizer, path)
            continue
        paths = _paths(example)
        sizes = [_check_answer(turns, index, tools, paths, tokenizer, path) for index in _answers(turns)]
        assert sum(example.trained) == sum(sizes), "something beside the answers is trained"


def _answers(turns: list[dict[str, Any]]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]


def _paths(example: Example) -> list[tuple[list[int], list[bool]]]:
    """The trunk, and every branch with what leads to it: tokens, and whether each is trained."""
    return [
        (example.ids[:first] + example.ids[start:end], example.trained[: first + 1] + example.trained[start + 1 : end])
        for start, end, first in example.runs()
    ]


def _check_answer(
    turns: list[dict[str, Any]], index: int, tools: list[Any], paths: Any, tokenizer: Any, path: Path
) -> int:
    """The tokens of an answer: they follow what a server sends, spell the turn as the template writes it last, and end
    where generation does."""
    prompt: list[int] = _render(tokenizer, turns[:index], tools, tokenize=True, add_generation_prompt=True)
    runs = [  # where another path shares only the answer's first tokens, it is the shorter one
        [token for token, _ in takewhile(lambda pair: pair[1], zip(ids[size:], flags[size:], strict=True))]
        for ids, flags in paths
        if (size := len(prompt)) < len(ids) and ids[:size] == prompt
    ]
    trained = max(runs, key=len)
    turn, (_, eos, end, call) = turns[index], _family(path)
    led, spelled = (str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in (prompt, trained))
    assert spelled.endswith((call if turn.get("tool_calls") else "") or end or eos)
    assert trained[-1] in end_ids(tokenizer)
    assert turn["content"] in spelled
    assert all(call["function"]["arguments"]["city"] in spelled for call in turn.get("tool_calls", ()))
    assert turn.get("reasoning_content", "") in led + spelled
    whole = _render(tokenizer, turns[: index + 1], tools)
    text = spelled.removesuffix(str(tokenizer.decode(trained[-1:])))
    assert _bare(text) in _bare(whole)
    assert not whole.startswith(led) or _bare(whole.removeprefix(led)).startswith(_bare(text))
    return len(trained)


def _render(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any], **how: Any) -> Any:
    """What transformers makes of the turns: in the first way of writing them that loses no content."""
    texts = [turn["content"] for turn in turns if turn["content"]]
    ways = _ways(tokenizer, turns, tools)
    way = next(way for way, whole in ways if isinstance(whole, str) and all(text in whole for text in texts))
    return tokenizer.apply_chat_template(way, **{"tools": tools or None, "tokenize": False, "return_dict": False} | how)


def _ways(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any]) -> list[tuple[list[Any], str | Exception]]:
    """The turns as they are, with content in parts, with arguments in strings; and what the template makes of each."""
    in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    results = list[tuple[list[Any], str | Exception]]()
    for way in (turns, _with_strings(turns), in_parts, _with_strings(in_parts)):
        try:
            results.append((way, tokenizer.apply_chat_template(way, tools=tools or None, tokenize=False)))
        except (TemplateError, TypeError) as error:
            results.append((way, error))
    return results


def _with_strings(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changed = copy.deepcopy(turns)
    for turn in changed:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return changed


def _check_refusal(reason: str, turns: list[dict[str, Any]], tools: list[Any], tokenizer: Any, path: Path) -> None:
    """The template refuses these turns itself, or writes the same without what the sentence names."""
    thinks = "reasoning_content" in turns[-1]
    whole = [text for _, text in _ways(tokenizer, turns, tools)]
    if "refuses this conversation" in reason:
        assert any(isinstance(error, Exception) and str(error) in reason for error in whole)
    elif "does not read tools" in reason:
        assert list(map(str, whole)) == [str(text) for _, text in _ways(tokenizer, turns, [])]
    elif "does not write" in reason:
        key, place = re.findall(r"does not write (\w+) of turn (\d+)", reason)[0]
        known = turns[: int(place)]
        without = [*known[:-1], {name: value for name, value in known[-1].items() if name != key}]
        texts = [
            {text for _, text in _ways(tokenizer, some, tools) if isinstance(text, str)} for some in (known, without)
        ]
        assert texts[0] & texts[1]
    else:
        assert path.stem in _NO_THOUGHTS
        assert thinks
        assert "asks for an answer with" in reason


@pytest.mark.parametrize(
    "path", [path for path in _FILES if path.stem.endswith("_training")], ids=lambda path: path.stem
)
def test_what_trl_marks_is_what_is_trained(path: Path) -> None:
    """TRL marks a turn with the line's end after it, and what the prompt has opened already."""
    tokenizer, turns = _tokenizer(path), [_QUESTION, _ANSWER]
    example = encode(Row(1, tuple(turns)), tokenizer)
    given = _in_parts(turns, example, tokenizer)
    theirs: Any = tokenizer.apply_chat_template(given, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, flag in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if flag]
    assert _bare(_trained(example, tokenizer)) in _bare(str(tokenizer.decode(marked)))


def _bare(text: str) -> str:
    return "".join(text.split())
