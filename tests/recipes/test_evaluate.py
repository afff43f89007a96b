"""Perplexity as transformers computes it, exact match of greedy answers, KL between models."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from entrenar.cli.app import app
from entrenar.core.errors import InputError
from entrenar.data.dataset import load_dataset
from entrenar.evaluation.exact_match import Answer, exact_match
from entrenar.evaluation.generate import generate
from entrenar.opening.load import load
from entrenar.recipes.evaluate import evaluate


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def test_the_loss_is_that_of_transformers_on_the_answers_tokens(
    tiny_model_dir: Path, tiny_data: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(str(tiny_model_dir), tiny_data, quantize="none", match=False)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    total, count = 0.0, 0
    for line in tiny_data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = [{"role": "user", "content": row["prompt"]}]
        prompt = prompt_ids(tiny_tokenizer, question)
        answer = tiny_tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += reference(input_ids=ids, labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert result.tokens == count
    assert result.loss == pytest.approx(total / count, rel=2e-3)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_kl_is_zero_against_itself_and_positive_against_a_quantized_twin(tiny_model_dir: Path, tiny_data: Path) -> None:
    path = str(tiny_model_dir)
    assert evaluate(path, tiny_data, against=path, quantize="none", match=False).kl == pytest.approx(0, abs=1e-6)
    coarse = evaluate(path, tiny_data, against=path, quantize="int4", match=False).kl
    fine = evaluate(path, tiny_data, against=path, quantize="int8", match=False).kl
    assert coarse is not None
    assert fine is not None
    assert coarse > 4 * fine > 0


def test_answers_are_transformers_greedy_answers_whatever_the_batch(
    tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, tokenizer = load(str(tiny_model_dir), dtype="float32")
    reference: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    prompts = [[{"role": "user", "content": text}] for text in ("Please", "switch off the radio now", "reset my clock")]
    got = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    for messages, answer in zip(prompts, got, strict=True):
        ids = prompt_ids(tiny_tokenizer, messages)
        output = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        expected = tiny_tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        assert answer == expected


def test_an_answer_is_exact_up_to_white_space_at_its_ends() -> None:
    assert Answer("q", " yes\n", "yes").is_exact
    assert not Answer("q", "yes", "yes.").is_exact
    assert not Answer("q", "a b", "a  b").is_exact


class _Scripted:
    """A model that answers with tokens of our own, so that what is asked and what is compared can be seen."""

    def __init__(self, says: list[list[int]], eos: Any = None) -> None:
        self.says, self.asked, self.device = says, [], "cpu"
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=400))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        self.given = generation_config
        rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        start = len(self.asked)
        self.asked += rows
        said = self.says[start : start + len(rows)]
        longest = max(map(len, said))
        padded = torch.tensor([ids + [generation_config.pad_token_id] * (longest - len(ids)) for ids in said])
        return torch.cat([input_ids, padded], dim=1)


_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_the_template_makes_of_an_answer_is_expected_and_measures_its_limit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = _THINKING
    path = _rows(tmp_path / "data.jsonl", {"prompt": "Please", "completion": "on"})
    [example] = (dataset := load_dataset(path, tokenizer, 512)).examples
    answer: Any = tokenizer("<think>\n\n</think>\n\non", add_special_tokens=False)["input_ids"]
    for said, exact in ((answer, True), (answer[-2:], False)):
        model: Any = _Scripted([[*said, 2, 2, 9]])
        [found] = exact_match(model, tokenizer, dataset)
        assert found.expected == "<think>\n\n</think>\n\non"
        assert found.is_exact is exact
        assert model.asked == [example.ids[: len(example.ids) - len(answer) - 2]]
        assert model.given.max_new_tokens == 2 * (len(answer) + 1)


def test_generation_stops_at_the_templates_end_whatever_the_end_of_sequence_is(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    hello: Any = tokenizer("on", add_special_tokens=False)["input_ids"]
    model: Any = _Scripted([[*hello, 2, *hello, *hello]], eos=7)
    assert generate(model, tokenizer, [[{"role": "user", "content": "Please"}]], max_new_tokens=9) == ["on"]
    assert model.given.eos_token_id == [0, 2, 7]


def test_an_answer_after_a_turn_without_content_is_asked_for(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = _THINKING.replace("{{ m.content }}", "{{ m.content or m.tool_calls | tojson }}")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "on", "arguments": {}}}]}
    turns = [{"role": "user", "content": "Please"}, call, {"role": "assistant", "content": "on"}]
    dataset = load_dataset(_rows(tmp_path / "data.jsonl", {"messages": turns}), tokenizer, 512)
    model: Any = _Scripted([[2]])
    assert [answer.prompt for answer in exact_match(model, tokenizer, dataset)] == [""]


def test_rows_that_end_without_an_answer_cost_only_their_match(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Please"}, {"role": "assistant", "content": "on"}
    path = _rows(
        tmp_path / "data.jsonl",
        {"messages": [asked, said]},
        {"messages": [asked, said, {"role": "user", "content": "Thanks"}]},
        {"messages": [asked, said, asked, said | {"weight": 0}]},
    )
    result = evaluate(str(tiny_model_dir), path, quantize="none", dtype="float32")
    assert (result.rows, len(result.answers)) == (3, 1)
    assert result.exact_match == 0
    alone = evaluate(str(tiny_model_dir), path, quantize="none", match=False, dtype="float32")
    assert (alone.loss, alone.exact_match, alone.answers) == (result.loss, None, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_in_the_type_that_is_asked_for(
    tiny_model_dir: Path, tiny_data: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measured(model: Any, *rest: Any) -> Any:
        seen.append(str(model.dtype))
        return SimpleNamespace(tokens=1, loss=0.0, perplexity=1.0)

    monkeypatch.setattr("entrenar.recipes.evaluate.perplexity", measured)
    evaluate(str(tiny_model_dir), tiny_data, quantize="none", match=False, dtype=dtype)
    assert seen == [f"torch.{dtype}"]


@pytest.fixture
def larger_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model beside a tokenizer with one token more than it has rows, which also fills batches up."""
    shutil.copytree(tiny_model_dir, tmp_path / "larger")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "larger")
    tokenizer.add_tokens(["<more>"])
    tokenizer.pad_token = "<more>"
    tokenizer.save_pretrained(tmp_path / "larger")
    return tmp_path / "larger"


@pytest.mark.parametrize(("prompt", "completion"), [("Please <more>", "on"), ("Please", "on <more>")])
def test_a_token_that_the_model_lacks_is_refused_in_a_sentence(
    larger_tokenizer: Path, tmp_path: Path, prompt: str, completion: str
) -> None:
    path = _rows(
        tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": prompt, "completion": completion}
    )
    message = r"data\.jsonl:2: the tokenizer makes token (\d+) of this text, and the model has \1 tokens"
    with pytest.raises(InputError, match=message):
        evaluate(str(larger_tokenizer), path, quantize="none")
    if "<more>" in prompt:
        model, tokenizer = load(str(larger_tokenizer))
        messages = [[{"role": "user", "content": text}] for text in ("a", prompt)]
        with pytest.raises(InputError, match=message.replace(r"data\.jsonl:2", "prompt 2 of 2")):
            generate(model, tokenizer, messages, max_new_tokens=2)


def test_a_padding_token_that_the_model_lacks_harms_nothing(
    larger_tokenizer: Path, tiny_model_dir: Path, tiny_data: Path
) -> None:
    found, expected = (evaluate(str(path), tiny_data, quantize="none") for path in (larger_tokenizer, tiny_model_dir))
    assert found.loss == expected.loss
    assert [answer.actual for answer in found.answers] == [answer.actual for answer in expected.answers]


def _cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_says_what_was_left_out_and_which_day_it_was(
    tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dated = tmp_path / "dated"
    shutil.copytree(tiny_model_dir, dated)
    template = "{{ strftime_now('%Y') }}" + str(tiny_tokenizer.chat_template)
    (dated / "chat_template.jinja").write_text(template, encoding="utf-8")
    asked, said = {"role": "user", "content": "Please"}, {"role": "assistant", "content": "on"}
    path = _rows(
        tmp_path / "data.jsonl",
        {"messages": [asked, said, asked]},
        {"messages": [asked, said | {"content": "on " * 90}]},
    )
    arguments = ("eval", str(dated), "--data", str(path), "--quantize", "none", "--dtype", "float32")
    output = _cli(*arguments, "--max-length", "90", "--too-long", "drop")
    assert "exact match  none" in output
    assert "left out     1 rows" in output
    assert "date         2026-01-01" in output
    output = _cli(*arguments, "--no-match", "--date", "2024-02-29")
    assert "exact match" not in output
    assert "date         2024-02-29" in output
