"""Adapters of peft over a tied base, and over one whose vocabulary had grown: each way out gives peft's live logits."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import load_adapter
from entrenar.opening.adapted import open_model
from entrenar.opening.load import load
from entrenar.recipes.export import export
from entrenar.recipes.merge import merge

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]

IDS = [5, 9, 40, 7, 61, 11, 90, 33]
ROWS = "trainable_token_indices"
COMBINATIONS: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], ROWS: [5, 9, 11]},
    {"target_modules": ["q_proj"], ROWS: {"lm_head": [5, 9, 11]}},
    {"target_modules": ["q_proj"], ROWS: {"embed_tokens": [5, 9], "lm_head": [5, 9]}},
    {"target_modules": ["q_proj"], ROWS: {"lm_head": [5, 7], "embed_tokens": [5, 9]}},
    {"target_modules": ["q_proj"]},
]

GROWN: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"]},  # both beside the adapter
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
]


def their_model(base: Path, new: int = 0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if new:
        model.resize_token_embeddings(model.config.vocab_size + new)
    return model


def trained(model: Any, directory: Path, ids: list[int], options: dict[str, Any]) -> Tensor:
    """Live logits (T, V) of peft's model with random changes, saved."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(str(directory))
    return logits(model, ids)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def llama_cpp(path: Path, ids: list[int], lora: Path | None = None) -> Tensor:
    model = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, lora_path=str(lora) if lora else None)
    try:
        model.eval(ids)
        return torch.tensor(np.array(model.scores[: len(ids)]))
    finally:
        model.close()


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def plain_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(tiny_model_dir), tmp_path_factory.mktemp("gguf") / "base.gguf", to="gguf", type="f32")


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_every_way_out_of_an_adapter_over_a_tied_base_is_pefts(
    options: dict[str, Any], tiny_model_dir: Path, plain_gguf: Path, tmp_path: Path
) -> None:
    adapter, base = tmp_path / "adapter", str(tiny_model_dir)
    expected = trained(their_model(tiny_model_dir), adapter, IDS, options)
    assert (expected - logits(their_model(tiny_model_dir), IDS)).abs().max() > 0.05
    live, _ = load(base, "none", dtype="float32")
    load_adapter(live, adapter)
    assert torch.allclose(logits(live, IDS), expected, rtol=0, atol=1e-5)
    fused = export(base, tmp_path / "fused", adapter=str(adapter), type="f32")
    assert torch.allclose(logits(their_model(fused), IDS), expected, rtol=0, atol=1e-5)
    gguf = export(base, tmp_path / "fused.gguf", adapter=str(adapter), to="gguf", type="f32")
    assert kl(expected, llama_cpp(gguf, IDS)) < 1e-6
    is_plain = options == COMBINATIONS[-1]
    recipe = {"merge_method": "linear", "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1}}]}
    if not is_plain:  # neither undoes a tie, so that each is refused, and says how instead
        with pytest.raises(InputError, match=r"export the model with (it|the adapter)|tied, as a merge keeps"):
            merge({**recipe, "dtype": "float32"}, tmp_path / "merged")
        with pytest.raises(InputError, match=r"fuse it into the model instead|trained on another base"):
            export(base, tmp_path / "adapter.gguf", adapter=str(adapter), to="gguf-adapter")
        return
    merge({**recipe, "dtype": "float32"}, tmp_path / "merged")
    assert torch.allclose(logits(their_model(tmp_path / "merged"), IDS), expected, rtol=0, atol=1e-5)
    lora = export(base, tmp_path / "adapter.gguf", adapter=str(adapter), to="gguf-adapter")
    assert kl(expected, llama_cpp(plain_gguf, IDS, lora)) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", GROWN, ids=str)
def test_a_vocabulary_that_had_grown_has_pefts_rows(
    tied: bool, options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With embedding and head of V + 3 rows in the file, as axolotl, LLaMA-Factory and Unsloth leave them."""
    base, adapter = tiny_model_dir, tmp_path / "adapter"
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    if not tied:
        base, model = tmp_path / "untied", their_model(tiny_model_dir)
        model.config.tie_word_embeddings = False
        head = model.lm_head.weight.detach()
        model.lm_head.weight = torch.nn.Parameter(head + 0.05 * torch.randn(head.shape))
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    before = their_model(base).config.vocab_size
    ids = [*IDS, before, before + 2, 4]
    expected = trained(their_model(base, new=3), adapter, ids, options)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(adapter)
    if not tied and options in (GROWN[1], GROWN[3]):  # peft's file has no rows for the head, or as another's
        with pytest.raises(InputError, match=r"lm_head\.weight"):
            open_model(str(base), str(adapter), "none", dtype="float32")
        return
    live, found = open_model(str(base), str(adapter), "none", dtype="float32")
    assert torch.allclose(logits(live, ids), expected, rtol=0, atol=1e-5)
    assert found.convert_tokens_to_ids("<c>") == before + 2
    fused = export(str(base), tmp_path / "fused", adapter=str(adapter), type="f32")
    assert torch.allclose(logits(their_model(fused), ids), expected, rtol=0, atol=1e-5)
    gguf = export(str(base), tmp_path / "fused.gguf", adapter=str(adapter), to="gguf", type="f32")
    assert kl(expected, llama_cpp(gguf, ids)) < 1e-6
