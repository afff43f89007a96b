"""Config, tokenizer, template and weights of a model come from one place; a broken place is one sentence."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.files.stored_tensor import FileVersion
from entrenar.opening.source import open_source

_TEXT = "Please switch on 12345 lamps, ñandú!\n\n  <|im_start|>user"
_CHAT = [{"role": "user", "content": "Hi 42"}, {"role": "assistant", "content": "Hello"}]


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_directory_gives_its_own_config_tokenizer_and_template(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    directory = _copy(tiny_model_dir, tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    source = open_source(str(directory))
    assert source.path == directory
    assert source.config.to_dict() == AutoConfig.from_pretrained(directory).to_dict()
    assert source.tokenizer(_TEXT)["input_ids"] == tiny_tokenizer(_TEXT)["input_ids"]
    assert source.tokenizer.apply_chat_template(_CHAT, tokenize=False) == "[Hi 42][Hello]"
    assert source.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(directory).get_vocab()
    assert source.generation is not None


def test_a_directory_without_generation_settings_has_none(tmp_path: Path, tiny_model_dir: Path) -> None:
    directory = _copy(tiny_model_dir, tmp_path / "model")
    (directory / "generation_config.json").unlink()
    assert open_source(str(directory)).generation is None


def test_a_gguf_gives_its_own_config_tokenizer_and_template(
    make_gguf: Callable[..., Path], tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make_gguf("Q8_0")
    source = open_source(str(path))
    theirs = AutoConfig.from_pretrained(tiny_model_dir).to_dict()
    # What GGUF has no key for, or transformers writes for its own use.
    silent = {"initializer_range", "_name_or_path", "transformers_version", "dtype", "architectures", "pretraining_tp"}
    ours = source.config.to_dict()
    assert ours.pop("rms_norm_eps") == np.float32(theirs.pop("rms_norm_eps"))  # GGUF holds it in float32
    assert {key: ours[key] for key in theirs.keys() - silent} == {key: theirs[key] for key in theirs.keys() - silent}
    assert source.path == path
    assert source.tokenizer(_TEXT)["input_ids"] == tiny_tokenizer(_TEXT)["input_ids"]
    for opened in (False, True):
        ours, expected = (
            tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=opened)
            for tokenizer in (source.tokenizer, tiny_tokenizer)
        )
        assert ours == expected


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_opening_reads_no_weights(
    tiny_model_dir: Path, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tiny_model_dir if kind == "directory" else make_gguf()
    monkeypatch.setattr(FileVersion, "open", lambda self: pytest.fail("data were read"))
    source = open_source(str(path))
    assert len(list(source.weights.names())) == 20
    stored = {name: source.weights.stored(name) for name in source.weights.names()}
    assert (stored["model.norm.weight"].shape, stored["model.norm.weight"].dtype) == ((64,), torch.float32)
    monkeypatch.undo()
    assert torch.equal(stored["model.norm.weight"].read(), torch.ones(64))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *product(("config.json", "tokenizer.json", "generation_config.json"), ("", "{", "[]")),
        ("config.json", '{"model_type": "nonesuch"}'),
        ("config.json", '{"model_type": ["llama"]}'),
        ("tokenizer.json", '{"model": {"type": "nonesuch"}}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_broken_file_of_a_directory_is_an_input_error(
    tmp_path: Path, tiny_model_dir: Path, name: str, content: str
) -> None:
    directory = _copy(tiny_model_dir, tmp_path / "model")
    (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_source(str(directory))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_of_a_directory_is_an_input_error(tmp_path: Path, tiny_model_dir: Path, missing: str) -> None:
    directory = _copy(tiny_model_dir, tmp_path / "model")
    (directory / missing).unlink()
    with pytest.raises(InputError, match=str(directory)):
        open_source(str(directory))


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _copy(tiny_model_dir, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n", encoding="utf-8"
    )
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked on the terminal"))
    with pytest.raises(InputError):
        open_source(str(directory))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "~/absent", "a/b/c", "owner/absent", "absent", "-"])
def test_a_path_where_nothing_is_and_no_hub_answers_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"model (path )?'{path}'"):
        open_source(path)


def test_a_gguf_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.gguf does not exist"):
        open_source(str(tmp_path / "absent.gguf"))


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: metadata.pop(key)


def _with(
    key: str, value: Any, kind: GGUFValueType, sub: GGUFValueType | None = None
) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: metadata.update({key: GGUFValue(value, kind, sub)})


_ODD_METADATA: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another architecture": (_with("general.architecture", "mamba", GGUFValueType.STRING), "'mamba'"),
    "no architecture": (_without("general.architecture"), "None"),
    "no block count": (_without("llama.block_count"), r"lacks the key llama\.block_count"),
    "no epsilon": (_without("llama.attention.layer_norm_rms_epsilon"), "lacks the key llama.attention.layer_norm_rms"),
    "no heads": (_with("llama.attention.head_count", 0, GGUFValueType.UINT32), r"model\.gguf"),
    "heads in words": (_with("llama.attention.head_count", "four", GGUFValueType.STRING), r"model\.gguf"),
    "heads that do not divide": (_with("llama.attention.head_count", 7, GGUFValueType.UINT32), r"model\.gguf"),
    "heads per layer": (
        _with("llama.attention.head_count", [4, 2], GGUFValueType.ARRAY, GGUFValueType.INT32), "differs from layer",
    ),
    "layers that are not there": (_with("llama.block_count", 500, GGUFValueType.UINT32), "says 500 layers .* of 2, "),
    "layers without end": (_with("llama.block_count", 2**32 - 1, GGUFValueType.UINT32), "block_count is 4294967295"),
    "a layer too few": (_with("llama.block_count", 1, GGUFValueType.UINT32), "says 1 layers .* of 2, the last"),
    "a mixture": (_with("llama.expert_count", 4, GGUFValueType.UINT32), "is a mixture of experts"),
    "no kind of tokenizer": (_without("tokenizer.ggml.model"), "the tokenizer kind None"),
    "an unknown tokenizer": (_with("tokenizer.ggml.model", "bert", GGUFValueType.STRING), "the tokenizer kind 'bert'"),
    "an unknown split": (_with("tokenizer.ggml.pre", "nonesuch", GGUFValueType.STRING), "'nonesuch'"),
    "no tokens": (_without("tokenizer.ggml.tokens"), r"model\.gguf"),
    "a token type too few": (
        _with("tokenizer.ggml.token_type", [1, 1], GGUFValueType.ARRAY, GGUFValueType.INT32), r"model\.gguf",
    ),
    "merges of no tokens": (
        _with("tokenizer.ggml.merges", ["~ ~", "~~ ~"], GGUFValueType.ARRAY, GGUFValueType.STRING), "the merge '~ ~'",
    ),
    "merges that are no text": (
        _with("tokenizer.ggml.merges", [1, 2], GGUFValueType.ARRAY, GGUFValueType.INT32), "no tokenizer.ggml.merges",
    ),
    "no merges": (_without("tokenizer.ggml.merges"), "has no tokenizer.ggml.merges"),
    "a template that is no text": (_with("tokenizer.chat_template", 1, GGUFValueType.UINT32), "template that is no"),
    "more tokens than embeddings": (
        _with("tokenizer.ggml.tokens", [f"t{number}" for number in range(9999)], GGUFValueType.ARRAY,
              GGUFValueType.STRING), r"model\.gguf",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("adjust", "message"), _ODD_METADATA.values(), ids=_ODD_METADATA)
def test_gguf_metadata_that_make_no_model_are_an_input_error(
    make_gguf: Callable[..., Path], adjust: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = make_gguf(adjust=adjust)
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("factors", [np.arange(1, 9), np.full(8, 8.0), np.ones(4), np.full(8, np.nan)])
def test_rotary_factors_that_are_not_llama_3s_are_refused_rather_than_ignored(
    make_gguf: Callable[..., Path], factors: np.ndarray
) -> None:
    path = make_gguf(change=lambda arrays: arrays.update({"rope_freqs.weight": factors.astype(np.float32)}))
    with pytest.raises(InputError, match="rotary factors"):
        open_source(str(path))
