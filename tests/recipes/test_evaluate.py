"""Perplexity as transformers computes it, exact match of greedy answers, KL between models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data.rows import Row
from entrenar.evaluation.exact_match import Answer, exact_match
from entrenar.evaluation.generate import generate
from entrenar.models.load import load
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


