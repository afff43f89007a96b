"""A tiny Llama with its tokenizer, and a little data to train it on."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import decoders as decode
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS

_TEMPLATES = Path(__file__).parents[1] / "templates"
_HEADERS = "system\nYou are a helpful AI assistant named SmolLM, user\nassistant\n"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SUBJECTS = ("the lamp", "the door", "a window", "the radio", "my clock", "the heater")
_ACTIONS = (("switch on", "on"), ("switch off", "off"), ("check", "status"), ("reset", "reset"))


def _exchanges() -> list[dict[str, str]]:
    """24 requests and their answers, all different."""
    return [
        {"prompt": f"Please {verb} {thing}.", "completion": f'{{"do": "{command}", "what": "{thing.split()[1]}"}}'}
        for thing in _SUBJECTS
        for verb, command in _ACTIONS
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens at most, with SmolLM2's split, special tokens and chat template."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["smollm"].make()
    backend.decoder = decode.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    texts = [text for row in _exchanges() for text in row.values()] + [_HEADERS]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=_SPECIAL[0], bos_token=_SPECIAL[1], eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[2], clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = (_TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8")
    return tokenizer


def save_model(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama (float32, tied embeddings, grouped queries) written to a Hugging Face directory."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path) -> Path:
    """A JSONL file of 24 different prompt/completion rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in _exchanges()), encoding="utf-8")
    return path
