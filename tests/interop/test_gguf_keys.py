"""Every key that changes what llama.cpp computes changes it here too, or is refused by name.

The list in gguf/values.py was derived so, with all keys of llama.cpp's table; this asks about those it named.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.opening.load import load
from tests.support.exporting import export_gguf
from tests.support.gguf_models import make_model
from tests.support.llama_cpp_logits import F32, GELU, relative_error, tokens

pytestmark = pytest.mark.interop

_READ: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"rope.freq_base": 500.0}),
    ("qwen2", {"attention.layer_norm_rms_epsilon": 0.01}),
    ("llama", {"rope.scaling.factor": 2.0}),
    ("smollm3", {"rope.scale_linear": 4.0}),
    ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}),
    ("llama", {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.2,
    }),
    ("gemma2", {"attention.sliding_window": 9}),
    ("gemma2", {"attn_logit_softcapping": 9.0}),
    ("gemma3_text", {"attention.sliding_window": 0}),
    ("gemma3_text", {"attention.sliding_window": None}),
    ("gemma3_text", {"attention.sliding_window_pattern": 2}),
    ("gemma3_text", {"rope.freq_base_swa": 300.0}),
    ("gemma3_text", {"rope.freq_base": None}),
    ("gemma3_text", {"final_logit_softcapping": 20.0}),
    ("gemma3_text", {"attn_logit_softcapping": 2.0}),
]  # fmt: skip


_KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def _rewritten(path: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """The same file with keys changed, or left out where None, and without tensors that end so."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path.with_name("changed.gguf"), architecture)
    named = {f"{architecture}.{key}": value for key, value in changes.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in named:
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, value in named.items():
        if value is not None:
            writer.add_key_value(name, value, _KINDS[type(value)])
    for tensor in reader.tensors:
        if not tensor.name.endswith(without or ("?",)):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=gguf.GGMLQuantizationType(tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


@pytest.fixture(scope="module")
def written(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's float32 file."""
    folder = tmp_path_factory.mktemp("families")

    def write(name: str) -> Path:
        path = folder / name / "m.gguf"
        if not path.exists():
            path.parent.mkdir()
            export_gguf(make_model(name, len(tiny_tokenizer)), tiny_tokenizer, path, "f32")
        return path

    return write


@pytest.mark.parametrize(("name", "changes"), _READ)
def test_a_key_that_is_read_has_llama_cpps_effect(
    written: Callable[[str], Path], name: str, changes: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = _rewritten(written(name), changes)
    model, _ = load(str(path), "none", dtype="float32")
    bound = GELU if "gemma" in name else F32
    ids = tokens(len(tiny_tokenizer))
    assert relative_error(model, path, ids) < bound
    if "attn_logit_softcapping" not in changes or name != "gemma3_text":  # that one llama.cpp does not know
        before, _ = load(str(written(name)), "none", dtype="float32")
        assert relative_error(before, path, ids) > 2 * bound


_REFUSED = [
    *((name, "attention.causal", False) for name in ("llama", "qwen3", "phi3", "gemma2")),
    *((name, "rope.scaling.attn_factor", 2.0) for name in ("llama", "qwen2", "phi3", "gemma3_text")),
    *((name, "rope.dimension_count", 16) for name in ("gemma2", "gemma3_text")),
    *((name, "rope.dimension_count_swa", 8) for name in ("gemma2", "gemma3_text")),
    ("gemma2", "rope.freq_base_swa", 300.0), ("gemma2", "rope.scaling.factor", 2.0),
    ("phi3", "rope.scaling.factor", 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), _REFUSED)
def test_a_key_that_is_refused_changes_what_llama_cpp_computes(
    written: Callable[[str], Path], name: str, key: str, value: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Or the refusal would be for nothing."""
    path = _rewritten(written(name), {key: value})
    with pytest.raises(InputError, match=f"{key}|scales its rotary frequencies"):
        load(str(path), "none", dtype="float32")
    before, _ = load(str(written(name)), "none", dtype="float32")
    assert relative_error(before, path, tokens(len(tiny_tokenizer))) > 0.05


@pytest.mark.parametrize("absent", [("attn_output",), ("attn_output", "attn_k"), ("attn_q", "attn_v")])
def test_biases_that_are_not_there_are_zero(
    absent: tuple[str, ...], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = make_model("llama", len(tiny_tokenizer))
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    export_gguf(whole, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    path = _rewritten(tmp_path / "m.gguf", {}, tuple(f"{stem}.bias" for stem in absent))
    model, _ = load(str(path), "none", dtype="float32")
    biases = {name: value for name, value in model.state_dict().items() if name.endswith("bias")}
    assert len(biases) == 8
    assert sum(not torch.any(value) for value in biases.values()) == 2 * len(absent)
    assert relative_error(model, path, tokens(len(tiny_tokenizer))) < F32
    assert relative_error(whole, path, tokens(len(tiny_tokenizer))) > 0.01
