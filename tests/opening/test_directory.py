"""A directory is looked at before transformers opens it; its tensors are found under the names transformers finds them.

What is right is transformers' own loading of the same directory, or a sentence at once.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.opening.load import load
from entrenar.opening.source import open_source
from entrenar.recipes.export import export

IDS = torch.arange(5, 25)[None]
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
_MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1}  # fmt: skip
_WITH_BUFFERS: dict[str, dict[str, Any]] = {
    "apertus": {}, "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "glm4_moe": _MIXTURE,
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def made(kind: str, directory: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A random model of a kind in a directory, every buffer that is saved moved away from its first value."""
    config = AutoConfig.for_model(kind, **{**_TEXT, "vocab_size": len(tokenizer), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved:
                buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a directory with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: t.clone() for name, t in change(tensors).items()}, target / "model.safetensors", {"format": "pt"})
    return target


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def theirs(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


# Names


@pytest.fixture(scope="module", params=_WITH_BUFFERS)
def with_buffers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return made(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer, **_WITH_BUFFERS[request.param])


def test_saved_buffers_are_loaded_in_the_dtype_they_have_in_transformers(with_buffers: Path) -> None:
    torch.testing.assert_close(logits(load(str(with_buffers), dtype="float32")[0]), logits(theirs(with_buffers)))
    ours, peer = load(str(with_buffers), dtype="bfloat16")[0], theirs(with_buffers, torch.bfloat16)
    expected = {name: buffer for name, buffer in peer.named_buffers() if name in peer.state_dict()}
    found = dict(ours.named_buffers())
    assert expected
    for name, buffer in expected.items():
        torch.testing.assert_close(found[name], buffer, rtol=0, atol=0)  # checks dtypes too


def test_saved_buffers_are_exported_unrounded(with_buffers: Path, tmp_path: Path) -> None:
    export(str(with_buffers), str(tmp_path / "out"), type="bf16")
    before, after = load_file(with_buffers / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name, buffer in theirs(with_buffers).named_buffers() if name in before]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_a_saved_buffer_that_is_missing_is_named(with_buffers: Path, tmp_path: Path) -> None:
    buffers = {name for name, _ in theirs(with_buffers).named_buffers()}
    target = changed(with_buffers, tmp_path / "m", lambda t: {n: x for n, x in t.items() if n not in buffers})
    with pytest.raises(InputError, match=r"lacks \d+ tensors of .*(beta|layer_scalar|e_score_correction_bias)"):
        load(str(target))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_bare_decoder_gets_its_prefix(tmp_path: Path, tiny_model_dir: Path, quantize: str) -> None:
    """What AutoModel saves, which transformers loads as a language model."""
    bare = changed(tiny_model_dir, tmp_path / "m", lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    torch.testing.assert_close(logits(load(str(bare), quantize)[0]), logits(load(str(tiny_model_dir), quantize)[0]))
    torch.testing.assert_close(logits(theirs(bare)), logits(theirs(tiny_model_dir)))
    export(str(bare), str(tmp_path / "out"), type="f32")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tiny_model_dir / "model.safetensors").keys()
    )


def test_gpt2_is_loaded_as_it_lies_on_the_hub(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Without `transformer.`, with the masks of attention as tensors."""
    whole = made("gpt2", tmp_path / "whole", tiny_tokenizer, n_positions=64)
    masks = {f"h.{layer}.attn.bias": torch.tril(torch.ones(1, 1, 64, 64)) for layer in range(2)}
    hub = changed(whole, tmp_path / "hub", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()} | masks)
    torch.testing.assert_close(logits(load(str(hub), dtype="float32")[0]), logits(theirs(hub)))


def test_a_head_of_its_own_keeps_its_name_beside_a_bare_decoder(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = made("llama", tmp_path / "whole", tiny_tokenizer, tie_word_embeddings=False)
    bare = changed(whole, tmp_path / "bare", lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    assert "lm_head.weight" in load_file(bare / "model.safetensors")
    torch.testing.assert_close(logits(load(str(bare), dtype="float32")[0]), logits(theirs(bare)))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_what_a_wrapper_leaves_before_names_is_said(tmp_path: Path, tiny_model_dir: Path, prefix: str) -> None:
    wrapped = changed(tiny_model_dir, tmp_path / "m", lambda t: {f"{prefix}{n}": x for n, x in t.items()})
    with pytest.raises(InputError, match=rf"names its tensors with '{prefix}' before the names of LlamaForCausalLM"):
        load(str(wrapped))


def test_names_that_transformers_changes_are_said(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Pythia's head is embed_out in its files; loading it is not done, but it is not called missing."""
    pythia = made("gpt_neox", tmp_path / "m", tiny_tokenizer)
    message = r"embed_out\.weight is lm_head\.weight there\. transformers renames .*save_original_format=False"
    with pytest.raises(InputError, match=message):
        load(str(pythia))
    theirs(pythia).save_pretrained(tmp_path / "renamed", save_original_format=False)
    tiny_tokenizer.save_pretrained(tmp_path / "renamed")
    torch.testing.assert_close(logits(load(str(tmp_path / "renamed"), dtype="float32")[0]), logits(theirs(pythia)))


# Files


def test_another_quantization_is_named_by_all_who_open_a_base(tmp_path: Path, tiny_model_dir: Path) -> None:
    def gptq(tensors: Tensors) -> Tensors:
        name = "model.layers.0.mlp.up_proj"
        weight = tensors.pop(f"{name}.weight")
        codes = {"qweight": torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)}
        return tensors | {f"{name}.{leaf}": x for leaf, x in codes.items()} | {f"{name}.scales": torch.ones(1, 128)}

    directory = str(changed(tiny_model_dir, tmp_path / "m", gptq))
    for use in (load, open_source, lambda path: export(path, str(tmp_path / "o.gguf"), to="gguf", type="f16")):
        with pytest.raises(InputError, match="quantized as gptq, which is not read"):
            use(directory)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "model.safetensors", "added_tokens.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_regular_files_are_opened(tmp_path: Path, tiny_model_dir: Path, name: str, kind: str) -> None:
    """transformers would wait at a pipe for ever, and read a device without end."""
    target = tmp_path / "m"
    shutil.copytree(tiny_model_dir, target)
    (target / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(target / name)
    else:
        (target / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{name} is no file but a pipe, a device or a socket"):
        open_source(str(target))


@pytest.mark.parametrize(("files", "message"), [
    ([], r"has no tokenizer \(tokenizer\.json\): copy the tokenizer's files"),
    (["tokenizer.model"], "tokenizer.model alone .* sentencepiece and protobuf"),
])  # fmt: skip
def test_what_a_tokenizer_lacks_is_said(
    tmp_path: Path, tiny_model_dir: Path, files: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entrenar.opening.directory.find_spec", lambda name: None)
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    for name in files:
        (tmp_path / "m" / name).write_bytes(b"pieces")
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "m"))


# Configs


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**10}, "num_hidden_layers is 10000000000, but its files hold 20 tensors"),
    ({"num_hidden_layers": -3}, "model"),
    ({"num_labels": 10**12}, "num_labels is 1000000000000, more than any model has"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, but it is a whole number of at least 1"),
    ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
    ({"hidden_size": 6.5}, "hidden_size is 6.5"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"vocab_size": 2**50}, "embed_tokens.weight has shape"),
    ({"max_position_embeddings": 2**60, "head_dim": 2**40}, "has shape|sizes|not a causal"),
    ({"text_config": {"num_layers": 10**9}}, "num_layers is 1000000000"),
    ({"model_type": "qwen2_5_vl"}, "is a qwen2_5_vl, which transformers has no causal language model for"),
    ({"vocab_size": 10**4000}, "vocab_size|not JSON|model"),
    ({"layer_types": "x" * 10**6}, "model"),
    ({"pad_token_id": 10**6}, "pad_token_id is 1000000, but the embedding has"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_sizes_that_lie_are_named_at_once(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | changes
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    begin = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        load(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begin < 5


def test_tables_that_a_config_asks_for_are_bounded(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-J computes its positions: a length that lies would fill memory."""
    directory = made("gptj", tmp_path / "m", tiny_tokenizer, rotary_dim=8)
    torch.testing.assert_close(logits(load(str(directory), dtype="float32")[0]), logits(theirs(directory)))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_positions": 2**33}))
    with pytest.raises(InputError, match="bytes of computed tables"):
        load(str(directory))


def test_any_change_to_a_config_gives_its_model_or_an_input_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Random, but the same every time: values of other kinds and sizes, deep nesting, damaged text."""
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    path, chance = tmp_path / "m" / "config.json", random.Random(1)
    config = json.loads(path.read_text())
    values = [None, -1, 0, 10**9, 10**30, 1e308, "x", [], {}, [[1]], {"a": {"b": []}}, True, "llama", [10**9]]
    for _ in range(60):
        text = json.dumps(config | {chance.choice([*config, "text_config", "num_labels"]): chance.choice(values)})
        if chance.random() < 0.3:
            place = chance.randrange(len(text))
            text = text[:place] + chance.choice(["", "[" * 2000, '"', "0", "\x00"]) + text[place + 1 :]
        path.write_text(text)
        try:
            load(str(tmp_path / "m"), dtype="float32")
        except InputError as error:
            assert "\n" not in str(error)
