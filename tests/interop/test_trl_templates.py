"""The chat templates that TRL ships: what is trained of one and of two answers, or the true reason why not.

The right value is written by hand for each family: what the template writes between the prompt that a server sends and
the answer, and what ends it. Where TRL marks what the assistant says (`{% generation %}`), transformers' mask is a
second one. TRL itself is not imported: only its files are read.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
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
_REWRITES = "writes earlier turns differently once later ones follow"
_BORDER = "joins or splits the border"
_OPENS = "asks for an answer with .* and writes the turn without all of that"
_THOUGHT = "<think>\n\n</think>\n\n"
# Beginning of a file's name (the longest counts) → what stands before the answer, the end of sequence, what ends the
# turn (where it is another), and why two answers are refused. As the families' own files have them.
_FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", "", ""),
    "cohere2": ("", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ""),
    "deepseek": ("", "<｜end▁of▁sentence｜>", "", _OPENS),
    "diffusion_gemma": ("", "<turn|>", "", ""),
    "gemma": ("", "<eos>", "<end_of_turn>", ""),
    "gemma4": ("", "<turn|>", "", ""),
    "glm4moe": ("\n<think></think>\n", "<|endoftext|>", "<|user|>", ""),
    "gptoss": ("<|channel|>final<|message|>", "<|return|>", "", "only when nothing follows"),
    "idefics3": (" ", "<end_of_utterance>", "", ""),
    "lfm2": ("", "<|im_end|>", "", ""),
    "llama3": ("", "<|eot_id|>", "", ""),
    "llava_next": (" ", "</s>", "", ""),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>", "", ""),
    "nemotron_3": ("</think>", "<|im_end|>", "", _OPENS),
    "phi3": ("", "<|endoftext|>", "<|end|>", ""),
    "qwen2_5": ("", "<|im_end|>", "", ""),
    "qwen3": (_THOUGHT, "<|im_end|>", "", _REWRITES),
    "qwen3_training": (_THOUGHT, "<|im_end|>", "", ""),
    "qwen3_instruct": ("", "<|im_end|>", "", ""),
    "qwen3_vl": ("", "<|im_end|>", "", ""),
    "qwen3_5_nothink": ("", "<|im_end|>", "", _REWRITES),
    "qwen3_5_nothink_training": ("", "<|im_end|>", "", ""),
    "qwen3_5_think": ("\n</think>\n\n", "<|im_end|>", "", _REWRITES),
    "qwen3_5_think_training": ("\n</think>\n\n", "<|im_end|>", "", _BORDER),
    "qwen3_6": ("\n</think>\n\n", "<|im_end|>", "", _REWRITES),
    "qwen3_6_training": ("\n</think>\n\n", "<|im_end|>", "", _BORDER),
    "qwen3_8": ("\n</think>\n\n", "<|im_end|>", "", _BORDER),
    "smolvlm": (" ", "<end_of_utterance>", "", ""),
}
_QUESTION, _ANSWER = {"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue sky."}
_MORE = [{"role": "user", "content": "And grass?"}, {"role": "assistant", "content": "Green one."}]


def _family(path: Path) -> tuple[str, str, str, str]:
    return _FAMILIES[max((name for name in _FAMILIES if path.stem.startswith(name)), key=len)]


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Bytes, newlines in one token as Llama 3's and Qwen's have them, and every tag of the template as a token."""
    source = path.read_text(encoding="utf-8")
    _, eos, end, _ = _family(path)
    tags = {*_MARKUP.findall(source), *_MARKUP.findall(eos + end), "<|user|>", "<|assistant|>", "<|system|>"}
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


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_two_answers_are_trained_or_refused_with_the_reason(path: Path) -> None:
    before, eos, end, reason = _family(path)
    tokenizer, row = _tokenizer(path), Row(1, (_QUESTION, _ANSWER, *_MORE))
    if reason:
        with pytest.raises(InputError, match=reason):
            encode(row, tokenizer)
    else:
        end = end or eos
        assert _trained(encode(row, tokenizer), tokenizer) == f"{before}Blue sky.{end}{before}Green one.{end}"


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
