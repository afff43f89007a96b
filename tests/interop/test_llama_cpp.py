"""llama.cpp loads our GGUF, splits text as we do, and its logits are ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from tokenizers import Tokenizer, decoders
from tokenizers import normalizers as norm
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from entrenar.gguf.reader import GGUFFile
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export
from tests.support.exporting import export_gguf

pytestmark = pytest.mark.interop

TEXT = """The old lighthouse stood at the edge of the bay, where the fishing boats came home each evening. In 1987 its
keeper, a quiet man named Thomas, wrote down 412 names of ships that had passed. Nobody knew why he kept the list, but
children would climb the hill to hear him read it aloud, and the wind carried the names out across the water until they
were gone. Years later the town built a small museum, and the list was put behind glass with a lamp above it that never
went out. Visitors from the city often ask what the list was for; the guide only smiles and says that every ship
deserves to be remembered by somebody. On winter nights, when the museum is closed and the streets are empty, some say
that a voice can be heard reading from the hill, slowly and without a mistake, one name after the other, and that it
does not stop before the morning: 7:30, when the first boats go out again."""


@contextmanager
def llama_cpp(path: Path) -> Iterator[Llama]:
    model = Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


def mean_kl(model: PreTrainedModel, path: Path, ids: list[int]) -> float:
    """Mean KL(ours ‖ llama.cpp's) in nats a token, over every position."""
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    with llama_cpp(path) as other:
        other.eval(ids)
        theirs = torch.tensor(np.array(other.scores[: len(ids)])).log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def adapted(smollm2: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 on nf4 with an adapter that changes it visibly, float32."""
    model, tokenizer = load(str(smollm2), "nf4", dtype="float32")
    torch.manual_seed(0)
    attach_lora(model, rank=8, alpha=16)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.03)
    return model, tokenizer


# q8_0: llama.cpp rounds activations to 8 bits too, which alone costs 3.4e-3 with its AVX2 kernels; in all 5.0e-3.
@pytest.mark.parametrize(("type", "bound"), [("f16", 1e-3), ("bf16", 1e-3), ("q8_0", 7e-3)])
def test_logits_of_the_exported_model_are_those_of_the_live_one(
    adapted: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, type: str, bound: float
) -> None:
    model, tokenizer = adapted
    ids: list[int] = tokenizer(TEXT)["input_ids"][:200]  # pyright: ignore
    assert len(ids) == 200
    export_gguf(model, tokenizer, tmp_path / "m.gguf", type)
    assert mean_kl(model, tmp_path / "m.gguf", ids) < bound
    plain, _ = load(str(tmp_path / "m.gguf"), dtype="float32")
    for _, layer in adapted_layers(model):
        layer.lora_b.data.neg_()
    assert mean_kl(model, tmp_path / "m.gguf", ids) > 10 * bound
    for _, layer in adapted_layers(model):
        layer.lora_b.data.neg_()
    theirs_alone = mean_kl(plain, tmp_path / "m.gguf", ids)
    assert theirs_alone < bound
    assert mean_kl(model, tmp_path / "m.gguf", ids) < theirs_alone + 2e-3  # what the file itself lost


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "12345 6 78.9",
        "def f(x):\n\treturn x  # 3\n\n\n",
        "naïve café 東京 🙂🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_text_is_split_as_llama_cpp_splits_it(smollm2: Path, tmp_path: Path, text: str) -> None:
    _, tokenizer = load(str(smollm2))
    path = export(str(smollm2), tmp_path / "m.gguf", to="gguf", type="q8_0")
    for file in (smollm2, path):
        with llama_cpp(file) as other:
            assert other.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"]


def test_the_chat_template_travels(smollm2: Path, tmp_path: Path) -> None:
    path = export(str(smollm2), tmp_path / "m.gguf", to="gguf", type="q8_0")
    key = "tokenizer.chat_template"
    with llama_cpp(path) as other:
        assert other.metadata[key] == GGUFFile(smollm2).metadata[key]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-2-like vocabulary: byte tokens, a few words and all the pieces they are merged from."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    merges = []
    for left, right in [("▁", "s"), ("h", "i"), ("▁s", "hi"), ("▁shi", "p"), ("▁", "a"), ("1", "2")]:
        merges.append((left, right))
        vocab |= {piece: len(vocab) + n for n, piece in enumerate(p for p in (left, right) if p not in vocab)}
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_a_llama_with_sentencepiece_biases_and_an_untied_head(tmp_path: Path, rope_type: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    rope: dict[str, object] = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type == "llama3":
        rope |= {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False, initializer_range=0.05,
        max_position_embeddings=512, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    ids = list(torch.randint(3, len(tokenizer), (200,)))
    assert mean_kl(model, tmp_path / "m.gguf", [int(index) for index in ids]) < 1e-4
    text = "ships a 12 é"
    with llama_cpp(tmp_path / "m.gguf") as other:
        assert other.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]
