"""What is trained, for the ways in which chat templates open, write and end an answer; what is refused, with the cause.

The right value is written by hand: the answer as the template writes it after the prompt that a server sends, and the
one token that ends it.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data.encode import encode
from entrenar.data.rows import Row
from entrenar.data.turn_end import end_ids, template_of, usual_end
from tests.support.trees import paths_of

_TEXTS = ["a\n\nb\n\nc  \n x    y", "b\n\n", "assistant user system tool Roses are red. Blue. Green."] * 40
_SPECIAL = (
    "<eos>", "<|start|>", "<|end|>", "<|stop|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>",
    "<|reply|>", "[INST]", "[/INST]",
)  # fmt: skip
_PLAIN = ("<think>", "</think>", "<call>", "</call>", "\n\n\n")


def _make(template: str, *, eos: str | None = "<eos>", post: Any = None, split: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = split or pre.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_TEXTS, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    if post is not None:
        backend.post_processor = post
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def _turns(open_turn: str, after: str, between: str = "", last: str = "", answer: str = "", prompt: str = "") -> str:
    """A template: `open_turn` (with role), what an assistant's content is, `after` every turn, `between` after one that
    is not last, `last` after the last; `prompt` opens an answer."""
    content = answer or "{{ m.content }}"
    return (
        "{% for m in messages %}" + open_turn + "{% if m.role == 'assistant' %}" + content
        + "{% else %}{{ m.content }}{% endif %}" + after
        + "{% if not loop.last %}" + between + "{% elif not add_generation_prompt %}" + last + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


_CHATML = _turns("<|start|>{{ m.role }}\n", "<|end|>\n", prompt="<|start|>assistant\n")
_THOUGHT = "<think>\n\n</think>\n\n"
# Template → its text, and what is trained of one and of two answers. Each is the kind of a real family.
_KINDS: dict[str, tuple[str, str, str]] = {
    "closed turns": (_CHATML, "Blue.<|end|>", "Blue.<|end|>Green.<|end|>"),
    "end of sequence after the last": (
        _turns("<|{{ m.role }}|>\n", "<|end|>\n", last="{{ eos_token }}", prompt="<|assistant|>\n"),
        "Blue.<|end|>", "Blue.<|end|>Green.<|end|>",
    ),
    "opens a turn after the last": (
        _turns("<|start|>{{ m.role }}<|reply|>", "<|stop|><|end|>", last="<|start|>assistant<|reply|>",
               prompt="<|start|>assistant<|reply|>"),
        "Blue.<|stop|><|end|>", "Blue.<|stop|><|end|>Green.<|stop|><|end|>",
    ),
    "open turns": (
        _turns("<|{{ m.role }}|>\n", "", answer="<think></think>\n{{ m.content }}", prompt="<|assistant|>\n"),
        "<think></think>\nBlue.<|user|>", "<think></think>\nBlue.<|user|><think></think>\nGreen.<|user|>",
    ),
    "end of sequence after answers": (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
        "' ' + m.content + ' ' + eos_token }}"
        "{% endfor %}",
        " Blue. <eos>", " Blue. <eos> Green. <eos>",
    ),
    "another end for the last": (
        _turns("<|start|>{{ m.role }}<|reply|>", "{{ '<|end|>' if m.role == 'user' }}",
               between="{{ '<|end|>' if m.role != 'user' }}", last="<|stop|>", prompt="<|start|>assistant"),
        "<|reply|>Blue.<|stop|>", "<|reply|>Blue.<|stop|><|reply|>Green.<|stop|>",
    ),
    "plain words": (
        _turns("### {{ m.role }}:\n", "\n\n", prompt="### assistant:\n"), "Blue.<eos>", "Blue.<eos>Green.<eos>",
    ),
    "a thought before the last": (
        _turns("<|start|>{{ m.role }}\n", "<|end|>\n", prompt="<|start|>assistant\n",
               answer="{{ '" + _THOUGHT.replace("\n", "\\n") + "' if loop.last else '' }}{{ m.content }}"),
        _THOUGHT + "Blue.<|end|>", f"{_THOUGHT}Blue.<|end|>{_THOUGHT}Green.<|end|>",
    ),
    "a prompt that opens a thought": (
        _turns("<|start|>{{ m.role }}\n", "<|end|>\n", prompt="<|start|>assistant\n<think>\n"),
        "Blue.<|end|>", "Blue.<|end|>Green.<|end|>",
    ),
    "a prompt that opens a thought which turns close": (
        _turns("<|start|>{{ m.role }}\n", "<|end|>\n", answer="<think></think>{{ m.content }}",
               prompt="<|start|>assistant\n<think>\n"),
        "</think>Blue.<|end|>", "</think>Blue.<|end|></think>Green.<|end|>",
    ),
    "content in parts": (
        "{% for m in messages %}<|start|>{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant:{% endif %}",
        "Blue.<|end|>", "Blue.<|end|>Green.<|end|>",
    ),
    "spaces trimmed": (
        _turns("<|start|>{{ m.role }}\n", "<|end|>", answer="{{ m.content | trim }}", prompt="<|start|>assistant\n"),
        "Blue.<|end|>", "Blue.<|end|>Green.<|end|>",
    ),
}  # fmt: skip


def _row(*turns: Any, **more: Any) -> Row:
    roles = ("user", "assistant")
    made = [t if isinstance(t, dict) else {"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    return Row(1, tuple(made), **more)


def _trained(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    """Of every path, in the order of the answers; of what two share once."""
    seen, ids = set[tuple[int, ...]](), list[int]()
    for path, flags in paths_of(encode(row, tokenizer)):
        trained = [path[: index + 1] for index, flag in enumerate(flags) if flag]
        ids += [prefix[-1] for prefix in trained if tuple(prefix) not in seen]
        seen |= set(map(tuple, trained))
    return str(tokenizer.decode(ids))


def _served(row: Row, tokenizer: PreTrainedTokenizerFast, until: int) -> Any:
    return tokenizer.apply_chat_template(
        list(row.messages[:until]), add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("kind", _KINDS)
def test_one_answer_is_trained_with_what_ends_it(kind: str) -> None:
    template, expected, _ = _KINDS[kind]
    tokenizer = _make(template)
    example = encode(_row("What colour?", "Blue."), tokenizer)
    assert _trained(_row("What colour?", "Blue."), tokenizer) == expected
    assert example.answer is not None
    start, end = example.answer
    assert example.trained == [start <= place < end for place in range(len(example))]
    assert example.ids[end - 1] in end_ids(tokenizer)
    if kind != "content in parts":  # transformers gives this one its text letter by letter
        assert example.ids[:start] == _served(_row("What colour?"), tokenizer, 1)


@pytest.mark.parametrize("kind", _KINDS)
def test_two_answers_are_trained_each_with_what_ends_it(kind: str) -> None:
    template, _, expected = _KINDS[kind]
    assert _trained(_row("What colour?", "Blue.", "And grass?", "Green."), _make(template)) == expected


@pytest.mark.parametrize("kind", [kind for kind in _KINDS if kind != "content in parts"])
def test_every_answer_follows_the_prompt_that_is_served(kind: str) -> None:
    row, tokenizer = (
        _row("What colour?", "Blue.", "And grass?", "Green.", "And snow?", "White."),
        _make(_KINDS[kind][0]),
    )
    sequences = [ids for ids, _ in paths_of(encode(row, tokenizer))]
    for until, answer in ((1, "Blue."), (3, "Green."), (5, "White.")):
        prompt = _served(row, tokenizer, until)
        after = [str(tokenizer.decode(ids[len(prompt) :])) for ids in sequences if ids[: len(prompt)] == prompt]
        assert any(answer in text for text in after)


@pytest.mark.parametrize("kind", _KINDS)
def test_what_the_user_says_after_an_answer_is_not_trained(kind: str) -> None:
    template, one, _ = _KINDS[kind]
    tokenizer = _make(template)
    assert _trained(_row("What colour?", "Blue.", "Thanks. <eos>"), tokenizer) == one
    assert encode(_row("What colour?", "Blue.", "Thanks."), tokenizer).answer is None


def test_the_end_is_the_tokenizers_own_among_several_and_never_white_space() -> None:
    """Gemma has tokens for runs of newlines; Command R7B ends a reply before it ends a turn."""
    tokenizer = _make(_turns("<|start|>{{ m.role }}\n", "<|stop|>\n\n\n", prompt="<|start|>assistant\n"))
    assert _trained(_row("Hi", "Blue."), tokenizer) == "Blue.<|stop|>"
    tokenizer = _make(_turns("<|start|>{{ m.role }}\n", "<|end|><|stop|><|system|>\n"), eos="<|stop|>")
    assert _trained(_row("Hi", "Blue."), tokenizer).endswith("Blue.<|end|><|stop|>")


@pytest.mark.parametrize(
    "answer", ["a <|end|> b", "<think>x</think>", "x</think>", "<call>f</call>\n\n\n", "<|user|>", "Blue.<|end|>"]
)
def test_an_answer_that_holds_added_tokens_is_trained_whole(answer: str) -> None:
    assert _trained(_row("Hi", answer, "Bye", "See you."), _make(_CHATML)) == f"{answer}<|end|>See you.<|end|>"


@settings(max_examples=60, deadline=None)
@given(answer=st.text(st.sampled_from(" \n\tab.é<|"), min_size=1, max_size=9).filter(str.strip))
def test_any_answer_follows_the_tokens_that_are_served_and_is_trained_whole(answer: str) -> None:
    """Whatever white space it begins with: no token lies across the border."""
    row = _row("Hi", answer)
    for tokenizer in _BORDER:
        example = encode(row, tokenizer)
        assert example.answer is not None
        start, end = example.answer
        assert example.ids[:start] == _served(row, tokenizer, 1)
        assert str(tokenizer.decode(example.ids[start:end])) == answer + "<|end|>"


_BORDER = [
    _make(_CHATML, split=split, post=processors.ByteLevel(trim_offsets=trim))
    for split in (pre.ByteLevel(add_prefix_space=False, use_regex=False), pre.ByteLevel(add_prefix_space=False))
    for trim in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
@pytest.mark.parametrize("answer", ["Blue.", " Blue.", "\nBlue."])
def test_a_sentencepiece_tokenizer_writes_no_space_of_its_own_before_an_answer(scheme: str, answer: str) -> None:
    trained = Tokenizer(BPE())
    trained.train_from_iterator(
        [f"▁{word}" for word in ("Blue.", "Hi", "user", "assistant")], BpeTrainer(show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = [*_SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = _CHATML
    row = _row("Hi", answer)
    example = encode(row, tokenizer)
    whole: Any = tokenizer.apply_chat_template(list(row.messages), tokenize=True, return_dict=False)
    assert tokenizer.decode(example.ids) == tokenizer.decode(whole)
    assert example.answer is not None
    assert example.ids[: example.answer[0]] == _served(row, tokenizer, 1)
    assert _trained(row, tokenizer) == answer + "<|end|>"


def test_an_earlier_answer_whose_border_changes_later_has_a_branch() -> None:
    tokenizer = _make(_CHATML.replace("\n", "\n\n"))
    row = _row("Hi", "Blue.", "Bye", "Green.")
    prompt = _served(row, tokenizer, 1)
    assert _served(row, tokenizer, 3)[: len(prompt)] != prompt, "newlines are split otherwise when a word follows"
    (first, flags), _ = paths_of(encode(row, tokenizer))
    assert first[: len(prompt)] == prompt
    assert tokenizer.decode(first[len(prompt) :]) == "Blue.<|end|>"
    assert flags == [False] * len(prompt) + [True] * (len(first) - len(prompt))
    assert _trained(row, tokenizer) == "Blue.<|end|>Green.<|end|>"


_LOSES = {
    "what was thought": ("{{ m.content.split('</think>')[-1] }}", "<think>\nRayleigh.\n</think>\n\nBlue.", "Rayleigh."),
    "the second half": ("{{ m.content[:4] }}", "Blue sky.", "Blue sky."),
    "everything": ("-", "Blue.", "Blue."),
    "the end": ("{{ m.content[:-1] }}", "Blue.", "Blue."),
    "inner white space": ("{{ m.content.split() | join(' ') }}", "def f():\n    return 1", "def f"),
    "case": ("{{ m.content | upper }}", "Blue.", "Blue."),
}


@pytest.mark.parametrize("case", _LOSES)
def test_a_template_that_leaves_out_what_is_said_is_refused(case: str) -> None:
    answer, said, piece = _LOSES[case]
    tokenizer = _make(_turns("<|start|>{{ m.role }}\n", "<|end|>\n", answer=answer, prompt="<|start|>assistant\n"))
    with pytest.raises(InputError, match="leaves out") as caught:
        encode(_row("Hi", said), tokenizer)
    assert piece in str(caught.value) or case in ("everything", "the end", "case")  # whatever is said


def test_a_tokenizer_that_cannot_spell_an_answer_is_refused() -> None:
    tokenizer = _make(_CHATML)
    bare = Tokenizer(BPE(vocab={"<unk>": 0, "H": 1, "i": 2}, merges=[], unk_token="<unk>"))
    bare.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = _CHATML
    with pytest.raises(InputError, match="does not spell"):
        encode(_row("Hi", "Blue."), tokenizer)


def test_a_prompt_that_answers_for_the_row_is_named() -> None:
    closed = _turns("<|start|>{{ m.role }}\n", "<|end|>\n", prompt="<|start|>assistant\n<think>\n\n</think>\n\n")
    assert _trained(_row("Hi", "Blue."), _make(closed)) == "Blue.<|end|>"
    with pytest.raises(InputError, match=r"asks for an answer with .*begins otherwise, with 'Rayleigh"):
        encode(
            _row("Hi", "<think>\nRayleigh.\n</think>\n\nBlue."),
            _make(closed.replace("{{ m.content }}{% else %}", "<think>\n{{ m.content[8:] }}{% else %}")),
        )


def test_a_template_that_drops_a_turn_before_an_answer_is_named() -> None:
    """Mistral's third template writes the system turn before a last question only."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ messages[0].content if loop.last }}{{ m.content }}"
        "[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = _row(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Blue."},
    )
    with pytest.raises(InputError, match="earlier turns differently once the answer follows"):
        encode(row, _make(template))


def test_where_nothing_ends_an_answer_it_is_refused() -> None:
    template = _turns("### {{ m.role }}:\n", "\n", prompt="### assistant:\n")
    assert _trained(_row("Hi", "Blue."), _make(template)) == "Blue.<eos>"
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode(_row("Hi", "Blue."), _make(template, eos=None))


def test_generation_stops_at_what_training_ends_turns_with() -> None:
    tokenizer = _make(_CHATML)
    ids: Any = tokenizer.convert_tokens_to_ids(["<eos>", "<|end|>", "<|stop|>"])
    assert end_ids(tokenizer) == sorted(ids[:2])
    assert end_ids(tokenizer, ids[2]) == end_ids(tokenizer, [ids[2], ids[0]]) == sorted(ids)
    tokenizer.chat_template = None
    assert end_ids(tokenizer) == [ids[0]]
    assert usual_end(tokenizer)[1] is None


# Rows with more than content.
_WITH_CALLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</call>"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_CALL = {"type": "function", "function": {"name": "dim", "arguments": {"room": "study", "level": 30}}}
_WRITTEN = '<call>{"name": "dim", "arguments": {"room": "study", "level": 30}}</call>'
_TOOL = {"type": "function", "function": {"name": "dim"}}


def _calls(content: str | None, call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.mark.parametrize("content", ["", None, "Sure."])
@pytest.mark.parametrize("as_text", [False, True])
def test_calls_are_trained_as_the_template_writes_them(content: str | None, as_text: bool) -> None:
    function = _CALL["function"] | ({"arguments": json.dumps(_CALL["function"]["arguments"])} if as_text else {})
    row = _row(
        "Dim it", _calls(content, {"function": function}), {"role": "tool", "content": "ok"}, "Done.", tools=(_TOOL,)
    )
    tokenizer = _make(_WITH_CALLS)
    assert _trained(row, tokenizer) == f"{content or ''}{_WRITTEN}<|end|>Done.<|end|>"
    assert '"dim"' in str(tokenizer.decode(encode(row, tokenizer).ids)).partition("Dim it")[0]


def test_arguments_stay_text_where_the_template_joins_strings() -> None:
    joins = _WITH_CALLS.replace("{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}",
                                "{{ c.function.name + ':' + c.function.arguments }}")  # fmt: skip
    call = {"function": {"name": "dim", "arguments": '{"level": 30}'}}
    assert _trained(_row("Dim", _calls("", call)), _make(joins)) == '<call>dim:{"level": 30}</call><|end|>'


_AS_GIVEN = _WITH_CALLS.replace("{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}", "{}")
_WRITES = "{{ c.function.name }}({{ c.function.arguments }})"
_BRANCHES = (
    "{{ c.function.arguments if c.function.arguments is string else "
    "(c.function.arguments.keys() | join) + '=' + (c.function.arguments.values() | join) }}"
)


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        (_WRITES, 'dim({"level": 30})'),  # as apply_chat_template writes it, and no object of Python's
        ("dim {{ c.function.arguments | tojson }}", 'dim {"level": 30}'),  # a string would be one in a string
        ("dim {% for k, v in c.function.arguments | items %}{{ k }}: {{ v }}{% endfor %}", "dim level: 30"),
        ("dim {{ _BRANCHES }}", "dim level=30"),  # its own form for objects, which servers give
        ("dim {{ c.function.arguments + '' }}", 'dim {"level": 30}'),  # takes no object
    ],
)
def test_arguments_in_a_string_are_written_as_the_template_writes_them_well(writes: str, expected: str) -> None:
    template = _AS_GIVEN.replace("{}", writes.replace("{{ _BRANCHES }}", _BRANCHES))
    call = {"function": {"name": "dim", "arguments": '{"level": 30}'}}
    assert _trained(_row("Dim", _calls("", call)), _make(template)) == f"<call>{expected}</call><|end|>"


def test_objects_become_json_where_a_template_joins_strings() -> None:
    template = _AS_GIVEN.replace("{}", "{{ c.function.name + ':' + c.function.arguments }}")
    row = _row("Dim", _calls("", {"function": {"name": "dim", "arguments": {"room": "é", "on": True}}}))
    assert _trained(row, _make(template)) == '<call>dim:{"room": "é", "on": true}</call><|end|>'


_CUTS = {
    "the second call": "{{ m.tool_calls[0].function | tojson if loop.first }}",
    "the values": "{{ c.function.name }}({{ c.function.arguments.keys() | join(',') }})",
    "the arguments": "{{ c.function.name }}",
    "the names": "{{ c.function.arguments | tojson }}",
}


@pytest.mark.parametrize("cut", _CUTS)
@pytest.mark.parametrize(
    "values", [(3, 7), (True, False), ("den 2", "den"), ("same", "same"), (0.5, 5), (1, 11), ([1, 2], [2])]
)
def test_a_template_that_cuts_calls_is_refused(cut: str, values: tuple[Any, Any]) -> None:
    calls = [{"type": "function", "function": {"name": "light", "arguments": {"x": value}}} for value in values]
    row = _row("On", {"role": "assistant", "content": "", "tool_calls": calls})
    with pytest.raises(InputError, match=r"leaves out or rewrites what the assistant says: .* of its tool_calls"):
        encode(row, _make(_AS_GIVEN.replace("{}", _CUTS[cut])))
    written = "".join(
        f'<call>{{"name": "light", "arguments": {{"x": {json.dumps(value)}}}}}</call>' for value in values
    )
    assert _trained(row, _make(_WITH_CALLS)) == written + "<|end|>"


def test_content_that_a_call_displaces_is_refused() -> None:
    """Its word stands in the call, but not a second time."""
    template = _WITH_CALLS.replace("{{ m.content or '' }}", "{{ m.content if not m.tool_calls }}")
    with pytest.raises(InputError, match="leaves out"):
        encode(_row("On", _calls("dim", _CALL)), _make(template))


_DEAF = "{% if m.role in ('user', 'assistant') %}"
_SPOKEN = [{"role": role, "content": word} for role, word in (("user", "Hi"), ("assistant", "Blue."))]


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("said", ["The result is 9, at noon.", "Hi", "a", "Blue."])
def test_a_turn_that_the_template_leaves_out_is_refused_by_its_role(role: str, said: str) -> None:
    """Also where its few letters stand elsewhere."""
    turn = {"role": role, "content": said}
    row = _row(*_SPOKEN, turn, *_SPOKEN[1:]) if role == "tool" else _row(turn, *_SPOKEN)
    deaf = _CHATML.replace("%}", "%}" + _DEAF, 1).replace("{% endfor %}", "{% endif %}{% endfor %}")
    with pytest.raises(
        InputError, match=rf"leaves out or rewrites turn [13], of the role {role[:3]}|of the role system"
    ):
        encode(row, _make(deaf))
    assert "Blue.<|end|>" in _trained(row, _make(_CHATML))


def test_a_context_that_the_template_writes_in_its_own_way_is_kept() -> None:
    """Trimmed, joined, as JSON in a string, moved, without an earlier thought."""
    template = (
        "{% for m in messages if m.role == 'system' %}{{ m.content.split() | join(' ') }}\n{% endfor %}"
        + _CHATML.replace("{% else %}{{ m.content }}", "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
                          "{% elif m.role != 'system' %}{{ m.content | trim }}")
    )  # fmt: skip
    row = _row(
        {"role": "user", "content": "  Hi there,\n\n you <|end|> too  "},
        {"role": "system", "content": "Be  brief\nand kind."},
        {"role": "tool", "content": 'a "quoted" é\nline'},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Blue."},
    )
    assert _trained(row, _make(template)) == "Blue.<|end|>"


def test_an_answer_in_the_context_must_be_written_too() -> None:
    row = _row("Hi", "Quito it is.", "Sure?", "Lima.", untrained=frozenset([1]))
    template = _CHATML.replace("{{ m.content }}{% else", "{{ m.content if 'Quito' not in m.content }}{% else")
    with pytest.raises(InputError, match="turn 2, of the role assistant"):
        encode(row, _make(template))
    thought = _row("Hi", "<think>\nPeru?\n</think>\n\nQuito it is.", "Sure?", "Lima.", untrained=frozenset([1]))
    forgets = _CHATML.replace("{{ m.content }}{% else", "{{ m.content.split('</think>')[-1] }}{% else")
    assert _trained(thought, _make(forgets)) == "Lima.<|end|>"


def test_a_models_own_ends_count() -> None:
    """GLM's calls end with the token that opens the tool's turn; its generation config stops there."""
    template = _turns("<|{{ m.role }}|>\n", "", prompt="<|assistant|>\n")
    tokenizer = _make(template)
    row = _row("Hi", "Blue.", {"role": "tool", "content": "Noon."}, {"role": "assistant", "content": "Green."})
    with pytest.raises(InputError, match="which generation does not stop at"):
        encode(row, tokenizer)
    ids: Any = tokenizer.convert_tokens_to_ids(["<eos>", "<|tool|>"])
    example = encode(row, tokenizer, template_of(tokenizer, ends=ids))
    trained = [i for i, flag in zip(example.ids, example.trained, strict=True) if flag]
    assert tokenizer.decode(trained) == "Blue.<|tool|>Green.<|user|>"


def test_reasoning_is_trained_as_the_template_writes_it() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        row = _row("Hi", {"role": "assistant", "content": "43", key: "17 + 26"})
        assert _trained(row, _make(_WITH_CALLS)) == "<think>\n17 + 26\n</think>\n\n43<|end|>"


_IGNORED = {
    "tools": _row("Hi", "Blue.", tools=(_TOOL,)),
    "tool_calls": _row("Hi", _calls("Sure.", _CALL)),
    "reasoning_content": _row("Hi", {"role": "assistant", "content": "43", "reasoning_content": "17 + 26"}),
    "enable_thinking": _row("Hi", "Blue.", options={"enable_thinking": False}),
}


@pytest.mark.parametrize("key", _IGNORED)
def test_what_a_template_does_not_read_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(InputError, match=rf"does not (read|write) .*{key}|does not read {key}"):
        encode(_IGNORED[key], _make(_CHATML))


def test_options_of_a_row_reach_the_template() -> None:
    template = _CHATML.replace("<|start|>assistant\n", "<|start|>assistant\n{{ '<think>' if deep }}")
    row = _row("Hi", "<think>x</think>Blue.", options={"deep": True})
    assert _trained(row, _make(template)) == "x</think>Blue.<|end|>"


def test_turns_that_the_row_leaves_out_are_context() -> None:
    row = _row("Hi", "Quito.", "Sure?", "Lima.", untrained=frozenset([1]))
    assert _trained(row, _make(_CHATML)) == "Lima.<|end|>"
    assert "Quito." in str(_make(_CHATML).decode(encode(row, _make(_CHATML)).ids))


@pytest.mark.parametrize(
    "empty", ["", "  \n", "\u200b", "\ufeff \u00ad", "<think></think>", "<think>\n\n</think>\n\n", "<|end|>", "<eos>"]
)
def test_a_turn_without_a_word_is_not_trained(empty: str) -> None:
    assert _trained(_row("Hi", empty, "Well?", "Yes."), _make(_CHATML)) == "Yes.<|end|>"


def test_an_answer_of_one_added_token_is_one() -> None:
    assert _trained(_row("Hi", "<call>", "Bye", "<|reply|>"), _make(_CHATML)) == "<call><|end|><|reply|><|end|>"
    with pytest.raises(InputError, match="leaves out"):
        encode(_row("Hi", "<call>"), _make(_CHATML.replace("{{ m.content }}{% else", "-{% else")))


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    row = _row(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Blue."},
    )
    for template, role in ((_CHATML, "system"), ("{# developer #}" + _CHATML, "developer")):
        tokenizer = _make(template)
        assert str(tokenizer.decode(encode(row, tokenizer).ids)).startswith(f"<|start|>{role}\nBe brief.")


_CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments|tojson }}</call>{% endfor %}"
)
_ASKED, _BLUE = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Blue."}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, _ASKED, _BLUE], "turn 1, of the role system"),
        ([_ASKED, _BLUE, {"role": "tool", "content": "A result that is long."}, _BLUE], "turn 3, of the role tool"),
        ([{"role": "user", "content": "Cut ## here"}, _BLUE], "turn 1, of the role user"),
    ],
)
def test_what_the_others_say_is_in_the_row_or_it_is_refused(turns: list[dict[str, Any]], reason: str) -> None:
    """A template of two roles that cuts what the user says: a server would leave the same out."""
    template = (
        "{% for m in messages if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>{{ m.content.split(' ##')[0] }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match=f"leaves out or rewrites {reason}"):
        encode(Row(1, tuple(turns)), _make(template))


@pytest.mark.parametrize(
    ("written", "is_whole"),
    [
        (_CALLS, True),
        (_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), False),
        (_CALLS.replace("c.function.arguments|tojson", "c.function.arguments|list|tojson"), False),
    ],
)
def test_every_call_is_written_with_its_numbers_or_refused(written: str, is_whole: bool) -> None:
    calls = [{"function": {"name": "f", "arguments": {"a": number}}} for number in (1, 2)]
    row = Row(1, (_ASKED, {"role": "assistant", "content": "", "tool_calls": calls}))
    tokenizer = _make(
        _turns("<|start|>{{ m.role }}\n", written + "<|end|>\n", prompt="<|start|>assistant\n"),
    )
    if is_whole:
        example = encode(row, tokenizer)
        trained = [i for i, flag in zip(example.ids, example.trained, strict=True) if flag]
        assert tokenizer.decode(trained) == '<call>f{"a": 1}</call><call>f{"a": 2}</call><|end|>'
    else:
        with pytest.raises(InputError, match=r"leaves out or rewrites what the assistant says: .* of its tool_calls"):
            encode(row, tokenizer)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("all", "Blue.<|end|>Green.<|end|>White.<|end|>"), ("last", "White.<|end|>"), ("marked", "Green.<|end|>")],
)
def test_which_answers_are_trained(train_on: Any, expected: str) -> None:
    row = _row("What colour?", "Blue.", "And grass?", "Green.", "And snow?", "White.", marked=frozenset([3]))
    tokenizer = _make(_CHATML)
    example = encode(row, tokenizer, train_on=train_on)
    assert tokenizer.decode([i for i, flag in zip(example.ids, example.trained, strict=True) if flag]) == expected


def test_nothing_marked_is_nothing_to_train_on() -> None:
    with pytest.raises(InputError, match=r"is trained \(data.train_on: marked\)"):
        encode(_row("Hi", "Blue."), _make(_CHATML), train_on="marked")


def test_an_assistant_that_speaks_first_follows_what_the_template_opens() -> None:
    row = Row(1, ({"role": "assistant", "content": "Hello."}, *_row("Hi", "Blue.").messages))
    tokenizer = _make(_CHATML)
    assert _trained(row, tokenizer) == "Hello.<|end|>Blue.<|end|>"
    assert str(tokenizer.decode(encode(row, tokenizer).ids)).startswith("<|start|>assistant\nHello.<|end|>")
    refuses = _make("{{ messages[0].content[0] }}" + _CHATML)
    with pytest.raises(InputError, match="the assistant speaks first, and with no turn before it"):
        encode(row, refuses)
    late = Row(1, row.messages, untrained=frozenset([0]))
    assert _trained(late, refuses) == "Blue.<|end|>"


def test_variables_for_the_template_stand_in_the_config_and_a_rows_own_go_before() -> None:
    tokenizer = _make("{{ mood or 'calm' }}" + _CHATML)
    template = template_of(tokenizer, options={"mood": "glad"})
    assert "glad" in tokenizer.decode(encode(_row("Hi", "Blue."), tokenizer, template).ids)
    assert "sad" in tokenizer.decode(encode(_row("Hi", "Blue.", options={"mood": "sad"}), tokenizer, template).ids)
    with pytest.raises(InputError, match=r"does not read depth of data\.template"):
        encode(_row("Hi", "Blue."), tokenizer, template_of(tokenizer, options={"depth": 3}))


_OPENER = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}" + (
    "<call>{{ c.function.name }} {{ c.function.arguments|tojson }}</call>{% endfor %}"
)
_END_OF_CALLS = {
    "the next role's marker": (
        _OPENER + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|tool|>",
    ),
    "a token of its own": (
        _OPENER + "{{ '<|stop|>' if m.tool_calls else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|stop|>",
    ),
    "what ends an answer": (
        _OPENER + "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
}


@pytest.mark.parametrize("how", _END_OF_CALLS)
@pytest.mark.parametrize("is_last", [True, False])
def test_a_turn_that_calls_tools_is_trained_to_the_token_that_lets_them_run(how: str, is_last: bool) -> None:
    """As GLM (the next role's marker), gpt-oss (`<|call|>`) and Qwen write it; with one call and with two."""
    template, end = _END_OF_CALLS[how]
    tokenizer = _make("{{ tools[0].function.name if tools else '' }}" + template)
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"a": word}}} for word in ("Blue", "Red")]
    for count in (1, 2):
        turns: list[dict[str, Any]] = [_ASKED, {"role": "assistant", "content": "", "tool_calls": calls[:count]}]
        rest = [] if is_last else [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
        example = encode(Row(1, (*turns, *rest), tools=({"function": {"name": "look"}},)), tokenizer, train_on="all")
        written = "".join(f'<call>look {{"a": "{word}"}}</call>' for word in ("Blue", "Red")[:count])
        spoken = str(tokenizer.decode([i for i, flag in zip(example.ids, example.trained, strict=True) if flag]))
        assert spoken.startswith(written + end)
        assert tokenizer.convert_tokens_to_ids(end) in end_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("</call>") not in end_ids(tokenizer)
