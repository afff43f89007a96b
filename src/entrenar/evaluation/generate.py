"""Greedy or sampled text from a model, many prompts at a time, through transformers' generate."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from entrenar.data.rows import Message
from entrenar.data.turn_end import end_ids, template_of
from entrenar.models.head import padding_id, refuse_foreign


def prompt_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
) -> str:
    """The conversation in the model's template, ready to be answered; without a template, the plain text. `options`:
    variables for the template."""
    if tokenizer.chat_template:
        return template_of(tokenizer, options=options).render(messages, answer_next=True)
    return "\n".join(message.get("content") or "" for message in messages)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """The answers to conversations, without special tokens; temperature 0 is greedy. `options`: variables for the
    chat template."""
    texts = [prompt_text(messages, tokenizer, options) for messages in prompts]
    encoded = [_token_ids(text, tokenizer) for text in texts]
    return generate_ids(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature
    )


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
) -> list[str]:
    """The same to prompts that are token ids already; InputError where one has a token that the model lacks."""
    for place, prompt in enumerate(prompts, 1):
        refuse_foreign(prompt, model, f"prompt {place} of {len(prompts)}")
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs = _generate_batch(model, tokenizer, [list(prompts[i]) for i in chosen], max_new_tokens, temperature)
        answers |= dict(zip(chosen, outputs, strict=True))
    return [answers[index] for index in range(len(prompts))]


def spoken_text(ids: Sequence[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer's tokens as text, up to the first that ends it and without special tokens."""
    ends = set(answer_ends(model, tokenizer))
    stop = next((place for place, index in enumerate(ids) if index in ends), len(ids))
    return str(tokenizer.decode(list(ids[:stop]), skip_special_tokens=True))


def answer_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's own list, the end of sequence, what the chat template ends one
    with."""
    return end_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A rendered template brings its own BOS; plain text gets the tokenizer's."""
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])  # pyright: ignore


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    longest = max(map(len, rows))
    ends = answer_ends(model, tokenizer)
    pad = padding_id(model, *ends)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    attention = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **sampling)
    output = model.generate(input_ids=ids, attention_mask=attention, generation_config=config)  # pyright: ignore
    return [spoken_text(row, model, tokenizer) for row in output[:, longest:].tolist()]
