"""Fixtures that all rooms share: a tiny tokenizer, a tiny Llama on disk, a little data, and the real SmolLM2."""

import json
import os
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may reach the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two workers; tiny models gain nothing from threads

from pathlib import Path

# What is remembered of tiny models is no business of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import decoders as decode
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar import native
from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS
from tests.support.gguf_files import make_gguf

__all__ = ["make_gguf"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What `make interop` and `make cuda` need is not there otherwise, so their tests are not even imported."""
    return (
        True if collection_path.name in ("interop", "cuda") and config.option.markexpr != collection_path.name else None
    )


def pytest_configure(config: pytest.Config) -> None:
    """Everything else tests the CPU, on a machine with a GPU too."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


MakeConfig = Callable[..., Path]
_ROOT = Path(__file__).parent
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


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens at most, with SmolLM2's split, special tokens and chat template; read only."""
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
    tokenizer.chat_template = (_ROOT / "templates" / "smollm2.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama (float32, tied embeddings, grouped queries) as a Hugging Face directory; read only."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    directory = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 different prompt/completion rows; read only."""
    path = tmp_path_factory.mktemp("tiny-data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _exchanges()), encoding="utf-8")
    return path


@pytest.fixture(params=[path for path in native.supported_paths() if path != "reference"], scope="module")
def native_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test that asks for it runs once on each path of the native library that this machine has."""
    with native.using(request.param):
        yield request.param


@pytest.fixture(params=native.supported_paths(), scope="module")
def kernel_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same with the reference among the paths."""
    with native.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct GGUF that `make setup` puts in models/."""
    path = _ROOT.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.is_file(), f"{path} is missing: run `make setup`"
    return path


@pytest.fixture
def make_config(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> MakeConfig:
    """make_config(output="a", **{"lora.rank": 8}) → path of a YAML file for a 6-step run."""

    def make(output: str = "run", **changes: object) -> Path:
        values: dict[str, object] = {
            "output": str(tmp_path / output),
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "data": {"train": str(tiny_data), "validation_fraction": 0.2},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "optimizer": {"lr": 1e-2, "warmup_steps": 1},
            "training": {"epochs": 2, "max_steps": 6, "batch_size": 8, "micro_batch": 3},
            "eval": {"every_steps": 2},
            "checkpoint": {"every_steps": 2},
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition(".")
            values[section] = {**dict(values[section]), key: value}  # pyright: ignore
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return make
