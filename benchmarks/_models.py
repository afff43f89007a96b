"""Random checkpoints for the benchmarks that need a model of some size: made once, in the temporary directory."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import write_checkpoint
from entrenar.opening.source import open_source

TOKENIZER = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_1B = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048,
)  # fmt: skip
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)  # fmt: skip - Llama 2's
LLAMA_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip - SmolLM2-135M's shape


def random_checkpoint(name: str, config: LlamaConfig) -> Path:
    """The directory of a bf16 checkpoint, its tokenizer included; written tensor by tensor if missing."""
    directory = Path(tempfile.gettempdir()) / "entrenar-benchmarks" / name
    complete = directory / "complete"
    if complete.is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.save_pretrained(directory)
    _tokenizer(config.vocab_size).save_pretrained(directory)
    tensors = [
        LazyTensor(name, tuple(parameter.shape), partial(_random, tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    ]
    write_checkpoint(directory, tensors, torch.bfloat16, max_shard_bytes=5_000_000_000)
    complete.touch()
    return directory


def _tokenizer(words: int) -> PreTrainedTokenizerBase:
    """SmolLM2's, or the first so many words of it."""
    whole = open_source(str(TOKENIZER)).tokenizer
    if len(whole) <= words:
        return whole
    backend: Any = whole.backend_tokenizer
    state = json.loads(backend.to_str())
    vocab = {token: index for token, index in whole.get_vocab().items() if index < words}
    merges = [pair for pair in state["model"]["merges"] if "".join(pair) in vocab and set(pair) <= vocab.keys()]
    state["model"] |= {"vocab": vocab, "merges": merges}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **whole.special_tokens_map)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """Matrices as transformers starts them, norms of ones."""
    return torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)
