"""llama.cpp reads what we write: the tokens of a text, what ends an answer, an adapter of peft's on the output head."""

import random
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from llama_cpp import Llama
from tokenizers import normalizers as norm
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.exporting.gguf import vocabulary_metadata
from entrenar.files.peft import read_adapter
from entrenar.gguf.vocabulary_probe import PROBES
from entrenar.gguf.writer import write_gguf_file
from entrenar.recipes.export import export
from tests.support.gguf_tokenizers import TOKENIZERS, random_text

pytestmark = pytest.mark.interop

_MODEL = {
    "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 1,
    "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
}  # fmt: skip


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, path: Path, *ends: int) -> Llama:
    keys = vocabulary_metadata(tokenizer, len(tokenizer) + 3, ends)
    write_gguf_file(path, {**_MODEL, **keys}, [])
    return Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_makes_the_tokenizers_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer, source = TOKENIZERS[kind](), random.Random(3)
    other = vocabulary_of(tokenizer, tmp_path / "v.gguf")
    texts = list(PROBES)
    if kind != "llama 2 in transformers 5":  # it alone puts no space before one that stands first; said by the export
        texts += [random_text(source) for _ in range(500)]
    if kind == "qwen2":  # said by the export too
        texts = [text for text in texts if norm.NFC().normalize_str(text) == text]
    for text in texts:
        found = other.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_bos_and_eos_around_a_text_are_llama_cpps_too(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama-bpe"]()
    ids = [(word, tokenizer.backend_tokenizer.token_to_id(word)) for word in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ids
    )
    other = vocabulary_of(tokenizer, tmp_path / "v.gguf")
    assert other.tokenize(b"a b", add_bos=True, special=True) == tokenizer("a b")["input_ids"]


def test_every_end_of_an_answer_ends_generation_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama-bpe"]()
    tokenizer.add_tokens(["<my_turn_ends>", "<so_does_this>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<my_turn_ends>{% endfor %}"
    ends: list[int] = tokenizer.convert_tokens_to_ids(["</s>", "<my_turn_ends>", "<so_does_this>"])  # pyright: ignore
    other = vocabulary_of(tokenizer, tmp_path / "v.gguf", *ends)
    vocabulary: Any = llama_cpp.llama_model_get_vocab(other.model)
    found = {index for index in range(len(tokenizer)) if llama_cpp.llama_vocab_is_eog(vocabulary, index)}
    assert set(ends) <= found
    assert found <= {*ends, tokenizer.get_vocab().get("<|im_end|>", -1)}  # llama.cpp knows this one by its text


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int], torch.Tensor]:
    """An untied model, peft's adapter on its head and queries, ids, and the live logits (T, V) that peft has."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("headed")
    tokenizer = TOKENIZERS["llama-bpe"]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    ids = torch.randint(5, len(tokenizer), (40,)).tolist()
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        logits = adapted(input_ids=torch.tensor([ids])).logits[0]
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=True)  # the head's own weight beside A and B
    return folder / "model", folder / "adapter", ids, logits


def test_an_adapter_of_the_output_head_is_applied_as_peft_applies_it(
    headed: tuple[Path, Path, list[int], torch.Tensor], tmp_path: Path
) -> None:
    model, adapter, ids, logits = headed
    assert read_adapter(adapter).tensors.base.keys() == {"lm_head.weight"}
    base = export(str(model), tmp_path / "m.gguf", type="f32")
    lora = export(str(model), tmp_path / "a.gguf", adapter=str(adapter), to="gguf-adapter")
    other = Llama(str(base), n_ctx=64, logits_all=True, verbose=False, lora_path=str(lora))
    other.eval(ids)
    theirs = torch.tensor(np.array(other.scores[: len(ids)]))
    other.close()
    torch.testing.assert_close(theirs, logits, atol=2e-4 * logits.abs().max().item(), rtol=0)
