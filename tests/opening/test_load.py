"""Loading: transformers' numbers from every kind of source, one tensor at a time, and strict about names and shapes."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from entrenar.core.errors import InputError
from entrenar.files import stored_tensor
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import write_checkpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.opening.load import load, load_source
from entrenar.opening.source import Weights, open_source
from entrenar.quant.tensor import dequantize_4bit, quantize_4bit

_IDS = torch.tensor([[1, 45, 99, 300, 7, 7, 12, 2]])
_SIZES: dict[str, Any] = {
    "vocab_size": 362, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama, untied": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama, biases": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3 rotary": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "mistral": MistralConfig(**_SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**_SIZES, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=5.0),
}


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=_IDS).logits


def _assert_same_logits(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The same numbers everywhere, and the same logits but for the roundings of our own forwards."""
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[ours.dtype]
    torch.testing.assert_close(_logits(ours), _logits(theirs.eval()), rtol=tolerance, atol=tolerance)


def _save(directory: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random model of an architecture; biases and norms too, which transformers starts at zero and one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def _copy(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """The checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name
    }


@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_logits_equal_those_of_from_pretrained(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    theirs = _save(tmp_path, _ARCHITECTURES[name], tiny_tokenizer)
    ours, _ = load(str(tmp_path), dtype="float32")
    assert type(ours) is type(theirs)
    _assert_same_logits(ours, theirs)


def test_shards_load_as_one_file_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    ours, _ = load(str(tmp_path / "shards"), dtype="float32")
    _assert_same_logits(ours, theirs)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_logits_equal_those_of_from_pretrained(make_gguf: Callable[..., Path], kind: str) -> None:
    path = make_gguf(kind)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours, _ = load(str(path), "none", dtype="float32")
    _assert_same_logits(ours, theirs)


def test_a_gguf_with_an_output_head_of_its_own(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, make_gguf: Callable[..., Path]
) -> None:
    theirs = _save(tmp_path / "untied", _ARCHITECTURES["llama, untied"], tiny_tokenizer)
    ours, _ = load(str(make_gguf(source=tmp_path / "untied")), "none", dtype="float32")
    _assert_same_logits(ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_that_stays_unquantized_has_the_asked_dtype(tiny_model_dir: Path, dtype: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype))
    ours, _ = load(str(tiny_model_dir), dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {getattr(torch, dtype)}
    _assert_same_logits(ours, theirs)


def test_the_model_is_frozen_and_in_evaluation_mode(tiny_model_dir: Path) -> None:
    model, _ = load(str(tiny_model_dir))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_generation_settings_come_along(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 5], "max_new_tokens": 9}')
    model, _ = load(str(tmp_path / "model"))
    assert model.generation_config is not None
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == ([2, 5], 9)


# Quantized as it is read


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize(("name", "double_quant"), [("llama, biases", False), ("llama, untied", True)])
def test_the_linear_layers_but_not_the_head_are_quantized(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, format: str, name: str, double_quant: bool
) -> None:
    """Equal to transformers' model with those weights rounded to what the format can hold."""
    theirs = _save(tmp_path, _ARCHITECTURES[name], tiny_tokenizer)
    for linear in _linears(theirs).values():
        packed = quantize_4bit(linear.weight, format=format, double_quant=double_quant)
        linear.weight.data = dequantize_4bit(packed)
    ours, _ = load(str(tmp_path), format, double_quant=double_quant, dtype="float32")
    quantized = {path for path, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized == _linears(theirs).keys()
    torch.testing.assert_close(_logits(ours), _logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_quantized_model_holds_packed_bytes_and_no_other_copy(tiny_model_dir: Path) -> None:
    """4 bits a weight and a float32 scale for 64 of them; embeddings (tied, so once) and norms in float32."""
    linear = sum(
        module.weight.numel() for module in _linears(AutoModelForCausalLM.from_pretrained(tiny_model_dir)).values()
    )
    model, _ = load(str(tiny_model_dir), "nf4", dtype="float32")
    others = 362 * 64 + 5 * 64
    expected = linear * (4 / 8 + 4 / 64) + others * 4
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()
    }
    assert sum(storages.values()) == expected


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_piece_a_thread_is_held_of_the_source(
    tiny_model_dir: Path, make_gguf: Callable[..., Path], kind: str, quantize: str
) -> None:
    source = open_source(str(tiny_model_dir if kind == "directory" else make_gguf("Q8_0")))
    tracked = _TrackedWeights(source.weights)
    tracking = dataclasses.replace(source, weights=tracked)
    model = load_source(tracking, quantize, double_quant=False, block_size=64, dtype=torch.float32)
    assert len(tracked.reads) == len(set(tracked.reads)) == 20
    assert 1 <= tracked.most_alive <= torch.get_num_threads() + 1
    assert tracked.alive() == 0, "the model leans on no tensor of the source"
    assert torch.isfinite(_logits(model)).all()


class _TrackedWeights:
    """Weights whose every piece lies in a numpy array of its own, so that one can see when it is let go."""

    def __init__(self, inner: Weights) -> None:
        self._inner = inner
        self._arrays: list[weakref.ref[np.ndarray]] = []
        self.reads: list[str] = []
        self.most_alive = 0

    def names(self) -> Iterable[str]:
        return self._inner.names()

    def stored(self, name: str) -> StoredTensor:
        stored = self._inner.stored(name)
        return dataclasses.replace(stored, decode=lambda raw: self._track(name, stored.decode(raw)))

    def _track(self, name: str, piece: Tensor) -> Tensor:
        array = np.array(piece.float().numpy())
        self._arrays.append(weakref.ref(array))
        self.reads.append(name)
        self.most_alive = max(self.most_alive, self.alive())
        return torch.from_numpy(array)

    def alive(self) -> int:
        return sum(array() is not None for array in self._arrays)


_BIG = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
_MEASURE = """
import sys, torch
from entrenar.core.memory import PeakMemory, anonymous_bytes
from entrenar.opening.load import load_source
from entrenar.opening.source import open_source

source = open_source(sys.argv[1])
load_source(open_source(sys.argv[2]), sys.argv[3], False, 64, torch.bfloat16)  # libraries that come with the first use
before = anonymous_bytes()
with PeakMemory(interval=0.001) as watch:
    model = load_source(source, sys.argv[3], double_quant=False, block_size=64, dtype=torch.bfloat16)
held = sum(parameter.nbytes for parameter in model.parameters())
print(held, watch.peak - before)
"""


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_the_peak_is_what_is_held_and_little_more(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, quantize: str
) -> None:
    """265 MB of bf16, 65 MB of it in the embedding; the process measures its own anonymous memory.

    Pieces that several threads read, and the comparison of the fast forwards, take 50 MB, on a busy machine 67.
    """
    directory = tmp_path / "big"
    _write_random(directory, _BIG)
    tiny_tokenizer.save_pretrained(directory)
    command = [sys.executable, "-c", _MEASURE, str(directory), str(tiny_model_dir), quantize]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    held, peak = map(int, result.stdout.split())
    linear = 4 * (4 * 1024**2 + 3 * 1024 * 4096)
    others = 2 * (2 * 32000 * 1024 + 9 * 1024)
    assert held == others + linear * {"nf4": 9 / 16, "int8": 17 / 16, "none": 2}[quantize]
    assert held - 2**23 < peak < held + 80 * 2**20


def _write_random(directory: Path, config: LlamaConfig) -> None:
    """A random bf16 checkpoint, written without a model in memory."""
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = [
        LazyTensor(name, tuple(parameter.shape), partial(torch.randn, parameter.shape))
        for name, parameter in model.named_parameters()
    ]
    write_checkpoint(directory, tensors, torch.bfloat16, max_shard_bytes=2**40)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_order_of_the_tensors_in_the_files_does_not_matter(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, quantize: str
) -> None:
    """Biases before weights, the head first, layers spread over shards."""
    _save(tmp_path / "one", _ARCHITECTURES["llama, biases"], tiny_tokenizer)
    expected, _ = load(str(tmp_path / "one"), quantize)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    for seed in range(3):
        directory = tmp_path / f"other {seed}"
        shutil.copytree(tmp_path / "one", directory, ignore=shutil.ignore_patterns("*.safetensors"))
        names = random.Random(seed).sample(sorted(tensors), len(tensors))
        lazy = [LazyTensor(name, tuple(tensors[name].shape), partial(tensors.__getitem__, name)) for name in names]
        write_checkpoint(directory, lazy, torch.float32, max_shard_bytes=[2**30, 40_000, 1][seed])
        found, _ = load(str(directory), quantize)
        assert found.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_the_rows_of_a_gguf_are_put_in_order_piece_by_piece(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, make_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:  # fmt: skip
    """Heads of 3·4096/2 elements, so that pieces of 4096 would cut them."""
    wide: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = LlamaConfig(**(_SIZES | wide), tie_word_embeddings=True)
    _save(tmp_path / "wide", config, tiny_tokenizer)
    path = make_gguf(kind, source=tmp_path / "wide")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    monkeypatch.setattr(stored_tensor, "PIECE_ELEMENTS", 4096)
    query = open_source(str(path)).weights.stored("model.layers.1.self_attn.q_proj.weight")
    assert len(query.starts()) == 3
    ours, _ = load(str(path), "none", dtype="float32")
    _assert_same_logits(ours, theirs)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_file_that_is_cut_before_its_weights_are_read_is_an_input_error_and_leaves_nothing_behind(
    tmp_path: Path, tiny_model_dir: Path, make_gguf: Callable[..., Path], kind: str
) -> None:
    """And not the SIGBUS that a mapped file ends with."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = tmp_path / "model" if kind == "directory" else make_gguf("F32")
    weights = path / "model.safetensors" if kind == "directory" else path
    source = open_source(str(path))
    os.truncate(weights, weights.stat().st_size // 2)
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match=rf"{weights} has changed since its header was read"):
        load_source(source, "nf4", double_quant=False, block_size=64, dtype=torch.float32)
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_loaded_model_has_no_part_of_a_file_mapped_or_open(
    tiny_model_dir: Path, make_gguf: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    path = make_gguf("BF16")
    if kind == "directory":  # a copy: others may have mapped the original
        path = Path(shutil.copytree(tiny_model_dir, tmp_path / "own"))
    _model = load(str(path))
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if link.startswith(str(path))]


@pytest.mark.parametrize(("options", "message"), [
    ({"quantize": "nf5"}, "nf5"), ({"quantize": "nf4", "block_size": 65}, "65"), ({"dtype": "float8"}, "float8"),
])  # fmt: skip
def test_unknown_formats_block_sizes_and_dtypes_are_input_errors(
    tiny_model_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(str(tiny_model_dir), **options)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = _copy(tiny_model_dir, tmp_path / "model", lambda tensors: tensors[name][3, 4:5].fill_(torch.inf))
    with pytest.raises(InputError, match=name):
        load(path, "nf4")


# Tied embeddings


def _assert_tied(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_tied_embeddings_stay_one_storage(tiny_model_dir: Path, make_gguf: Callable[..., Path], quantize: str) -> None:
    for path in (tiny_model_dir, make_gguf("F16")):
        _assert_tied(load(str(path), quantize)[0])


def test_a_tied_head_that_is_also_in_the_file_is_not_a_second_copy(tmp_path: Path, tiny_model_dir: Path) -> None:
    embedding = "model.embed_tokens.weight"
    path = _copy(tiny_model_dir, tmp_path / "model", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model, _ = load(path, dtype="float32")
    _assert_tied(model)
    _assert_same_logits(model, AutoModelForCausalLM.from_pretrained(tiny_model_dir))


def test_untied_embeddings_stay_two(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    _save(tmp_path, _ARCHITECTURES["llama, untied"], tiny_tokenizer)
    model, _ = load(str(tmp_path))
    assert (
        model.get_parameter("lm_head.weight").data_ptr() != model.get_parameter("model.embed_tokens.weight").data_ptr()
    )


# What does not fit is named

_DOWN = "model.layers.1.mlp.down_proj.weight"
_CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(_DOWN), rf"lacks 1 tensors of LlamaForCausalLM: {_DOWN}"),
    "two missing": (
        lambda t: (t.pop(_DOWN), t.pop("model.norm.weight")), rf"lacks 2 tensors .*: {_DOWN}, model\.norm\.weight"
    ),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), r"lacks 1 tensors .*: model\.embed_tokens\.weight"),
    "unexpected": (
        lambda t: t.update({"model.layers.2.extra": torch.zeros(2)}), r"has 1 tensors that .*: model\.layers\.2\.extra"
    ),
    "misshapen": (
        lambda t: t.update({_DOWN: torch.zeros(64, 64)}),
        rf"{_DOWN} has shape \(64, 64\) but the config says \(64, 128\)",
    ),
    "transposed": (lambda t: t.update({_DOWN: torch.zeros(128, 64)}), rf"{_DOWN} has shape \(128, 64\)"),
    "integers": (lambda t: t.update({_DOWN: torch.zeros(64, 128, dtype=torch.int8)}), rf"{_DOWN} holds codes, as I8"),
}  # fmt: skip


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(("change", "message"), _CHANGES.values(), ids=_CHANGES)
def test_tensors_that_do_not_fit_the_config_are_named(
    tmp_path: Path, tiny_model_dir: Path, change: Callable[[dict[str, Tensor]], object], message: str, quantize: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(_copy(tiny_model_dir, tmp_path / "model", change), quantize)


_GGUF_CHANGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda t: t.pop("blk.1.ffn_down.weight"), rf"lacks 1 tensors .*: {_DOWN}"),
    "unexpected": (
        lambda t: t.update({"blk.0.ssm_a.weight": np.zeros(2, np.float32)}),
        r"has 1 tensors that .*: blk\.0\.ssm_a\.weight",
    ),
    "misshapen": (lambda t: t.update({"blk.1.ffn_down.weight": np.zeros((64, 64), np.float32)}), rf"{_DOWN} has shape"),
    "no embedding": (lambda t: t.pop("token_embd.weight"), r"has no token_embd\.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), _GGUF_CHANGES.values(), ids=_GGUF_CHANGES)
def test_tensors_that_do_not_fit_the_metadata_are_named(
    make_gguf: Callable[..., Path], change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(str(make_gguf(change=change)))


def _with_config(directory: Path, target: Path, **changes: Any) -> str:
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return str(target)


@pytest.mark.parametrize("changes", [
    {"model_type": "nonesuch"}, {"model_type": "t5"}, {"hidden_size": "wide"}, {"num_attention_heads": 0},
    {"hidden_act": "nonesuch"}, {"vocab_size": -1}, {"num_hidden_layers": 3}, {"hidden_size": 128},
    {"rope_parameters": {"rope_type": "nonesuch"}},
], ids=str)  # fmt: skip
def test_a_config_that_makes_no_model_of_these_weights_is_an_input_error(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="model"):
        load(_with_config(tiny_model_dir, tmp_path / "model", **changes))


def test_a_truncated_shard_is_an_input_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete"):
        load(str(tmp_path / "model"))


def test_a_tied_head_with_values_of_its_own_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp_path / "model" / "model.safetensors")
    load(str(tmp_path / "model"))
    save_file({**tensors, "lm_head.weight": embedding + 1}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(str(tmp_path / "model"))
