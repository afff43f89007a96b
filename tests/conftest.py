"""Fixtures that all rooms share: a tiny tokenizer, a tiny Llama on disk, a little data, and the real SmolLM2."""

import os
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may reach the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two workers; tiny models gain nothing from threads

from pathlib import Path

# What is remembered of tiny models is no business of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from entrenar import native
from tests.support import tiny_llama
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


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens at most, with SmolLM2's split, special tokens and chat template; read only."""
    return tiny_llama.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama (float32, tied embeddings, grouped queries) as a Hugging Face directory; read only."""
    return tiny_llama.save_model(tmp_path_factory.mktemp("tiny-llama"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 different prompt/completion rows; read only."""
    return tiny_llama.write_rows(tmp_path_factory.mktemp("tiny-data") / "train.jsonl")


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
