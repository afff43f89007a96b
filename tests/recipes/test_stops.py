"""What a model learns to stop at is what every output of it stops at: by transformers' reader and by gguf's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from entrenar.data.turn_end import end_ids
from entrenar.evaluation.generate import generate
from entrenar.opening.load import load
from entrenar.recipes.export import export

# A turn ends with <|im_end|>, a turn that calls a tool with <|im_start|>; the end of sequence is <|endoftext|>.
_TEMPLATE = (
    "{{ tools[0].function.name if tools else '' }}{% for m in messages %}{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments|tojson }}){% endfor %}"
    "{{ '<|im_start|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture
def other_ends(tiny_model_dir: Path, tmp_path: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "chat_template.jinja").write_text(_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token, tokenizer.bos_token = "<|endoftext|>", None
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            stated = json.loads((model / name).read_text()) | {"eos_token_id": tokenizer.eos_token_id}
            (model / name).write_text(json.dumps(stated))
    return model


def test_directories_and_ggufs_stop_at_every_end(other_ends: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(other_ends)
    names = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    expected = sorted(map(tokenizer.convert_tokens_to_ids, names))
    assert end_ids(tokenizer) == expected

    export(str(other_ends), tmp_path / "out")
    stated = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert isinstance(stated, list)
    assert sorted(stated) == expected

    export(str(other_ends), tmp_path / "out.gguf", to="gguf", type="f32")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    named = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")]
    assert named == [tokenizer.convert_tokens_to_ids(name) for name in names]
    for path in (tmp_path / "out", tmp_path / "out.gguf"):
        model, _ = load(str(path))
        assert set(expected) <= set(model.generation_config.eos_token_id)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
def test_generation_stops_at_each_of_them(other_ends: Path, end: str) -> None:
    """A model that says nothing but one token is asked for one."""
    model, tokenizer = load(str(other_ends), quantize="none", dtype="float32")
    index, asked = int(str(tokenizer.convert_tokens_to_ids(end))), list[int]()

    def always(_module: object, _given: object, logits: Tensor) -> Tensor:
        asked.append(index)
        return torch.nn.functional.one_hot(torch.tensor(index), logits.shape[-1]).float().expand_as(logits)

    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(always)
    generate(model, tokenizer, [[{"role": "user", "content": "Hi"}]], max_new_tokens=5)
    assert asked == [index]
