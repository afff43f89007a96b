"""llama.cpp loads every family's GGUF, and its logits are those of the transformers model it was made of."""

import json
import random
from pathlib import Path

import pytest
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export
from tests.support.exporting import export_gguf
from tests.support.gguf_models import MODELS, PHI3_LONG, make_model
from tests.support.gguf_tokenizers import TOKENIZERS, random_text
from tests.support.llama_cpp_logits import F16, F32, GELU, relative_error, tokens

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(("type", "bound"), [("f32", F32), ("f16", F16)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, type: str, bound: float, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(name, len(tiny_tokenizer))
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type)
    error = relative_error(model, tmp_path / "m.gguf", tokens(len(tiny_tokenizer)))
    print(json.dumps({"family": name, "type": type, "error": error}))  # noqa: T201
    assert error < (max(bound, GELU) if "gemma" in name else bound)


@pytest.mark.parametrize(("context", "count"), [(256, 64), (512, 300)], ids=["short", "long"])
def test_longrope_is_transformers_within_and_beyond_the_original_context(
    context: int, count: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("phi3", len(tiny_tokenizer), **PHI3_LONG)
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    assert relative_error(model, tmp_path / "m.gguf", tokens(len(tiny_tokenizer), count), context) < F32


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])  # of the others it leaves out settings of ours
def test_transformers_own_reader_gives_the_model_back(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(name, len(tiny_tokenizer))
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.tensor([tokens(len(tiny_tokenizer))])
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma3_text"])
def test_an_adapter_is_applied(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Over every linear layer, a fused one of Phi-3 included; without it the logits are others."""
    rows, base = len(tiny_tokenizer), tmp_path / "m.gguf"
    export_gguf(make_model(name, rows, initializer_range=0.1), tiny_tokenizer, base, "f32")
    model, _ = load(str(base), dtype="float32")
    attach_lora(model, rank=4, alpha=8.0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    lora = export(str(base), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    error = relative_error(model, base, tokens(rows), lora=lora)
    print(json.dumps({"family": name, "adapter": True, "error": error}))  # noqa: T201
    assert error < (GELU if "gemma" in name else 5e-4)
    assert relative_error(model, base, tokens(rows)) > 0.05


_THETAS = {"sliding_attention": 5000.0, "full_attention": 200000.0}
_PLAIN = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in _THETAS.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma2", {"sliding_window": 20}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma3_text", {"sliding_window": 20}),
        ("gemma3_text", {"rope_parameters": _PLAIN}),
        ("gemma3_text", {"rope_parameters": _PLAIN | {"sliding_attention": _PLAIN["full_attention"]}}),
    ],
)
def test_the_bound_of_gelu_hides_no_setting(
    name: str, change: dict[str, object], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Another setting in the same model would be seen."""
    rows = len(tiny_tokenizer)
    export_gguf(make_model(name, rows), tiny_tokenizer, tmp_path / "m.gguf", "f32")
    error = relative_error(make_model(name, rows, **change), tmp_path / "m.gguf", tokens(rows))
    print(json.dumps({"family": name, "change": str(change), "error": error}))  # noqa: T201
    assert error > 5 * GELU


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if "transformers 5" not in kind])
def test_text_is_split_as_llama_cpp_splits_it(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    export_gguf(make_model("llama", len(tokenizer) + 3), tokenizer, tmp_path / "m.gguf", "f16")
    source = random.Random(1)
    other = Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    try:
        for _ in range(500):
            text = random_text(source)
            assert other.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
    finally:
        other.close()
