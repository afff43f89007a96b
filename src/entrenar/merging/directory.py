"""What lies beside the weights of a merged model: config, tokenizer, chat template, a README that says where from."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from entrenar.core.documents import read_json
from entrenar.core.errors import InputError
from entrenar.merging.layer_config import follow_layers
from entrenar.merging.layers import text_config
from entrenar.merging.models import InputModel
from entrenar.merging.plan import MergePlan
from entrenar.merging.vocabulary import write_added_tokens

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATE = "chat_template.jinja"


def write_model_files(directory: Path, plan: MergePlan, chat_template: str | None, readme: str) -> None:
    """Write everything but the weights."""
    template = _chat_template(plan, chat_template)
    _write_json(directory / "config.json", merged_config(plan))
    (directory / "README.md").write_text(readme, encoding="utf-8")
    _copy(plan.reference, directory, ("generation_config.json",))
    tokenizer = plan.vocabulary.tokenizer if plan.vocabulary else plan.reference
    _copy(tokenizer, directory, _TOKENIZER_FILES)
    if plan.vocabulary and plan.vocabulary.added:
        write_added_tokens(directory / "tokenizer.json", plan.vocabulary)
    if template is not None:
        _set_template(directory, template)


def merged_config(plan: MergePlan) -> dict[str, Any]:
    """The reference's config.json with what the merge changed."""
    config = copy.deepcopy(plan.reference.config)
    follow_layers(config, plan.origins)
    if "tie_word_embeddings" in config or not plan.is_tied:
        config["tie_word_embeddings"] = plan.is_tied and plan.reference.is_tied
    if plan.vocabulary:
        for part in (config, text_config(config)):
            if part is config or "vocab_size" in part:
                part["vocab_size"] = plan.vocabulary.rows
    dtypes = Counter()
    for tensor in plan.tensors:
        if tensor.dtype.is_floating_point:
            dtypes[tensor.dtype] += tensor.numel
    name = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    return config


def _copy(model: InputModel, directory: Path, names: tuple[str, ...]) -> None:
    if model.directory is None:  # a GGUF: its tokenizer is built from its metadata
        if "tokenizer.json" in names:
            from entrenar.opening.source import open_source  # imports transformers

            open_source(model.label.partition(".gguf")[0] + ".gguf").tokenizer.save_pretrained(directory)
        return
    for name in names:
        if (model.directory / name).is_file():
            shutil.copyfile(model.directory / name, directory / name)


def _chat_template(plan: MergePlan, choice: str | None) -> str | None:
    """The template to set, None for that of the tokenizer's files."""
    if choice is None:
        return None
    if choice == "auto":
        templates = Counter(text for text in map(_template_of, plan.models.values()) if text)
        return templates.most_common(1)[0][0] if templates else None
    if "{" in choice:
        return choice
    raise InputError(f"chat_template is {choice!r}: give auto (what most of the models have) or a Jinja template")


def _template_of(model: InputModel) -> str | None:
    if model.directory is None:
        return None
    if (model.directory / _TEMPLATE).is_file():
        return (model.directory / _TEMPLATE).read_text(encoding="utf-8")
    file = model.directory / "tokenizer_config.json"
    if not file.is_file():
        return None
    template = read_json(file, "tokenizer config").get("chat_template")
    return template if isinstance(template, str) else None


def _set_template(directory: Path, template: str) -> None:
    (directory / _TEMPLATE).write_text(template, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    if file.is_file():
        config = read_json(file, "tokenizer config")
        config.pop("chat_template", None)
        _write_json(file, config)


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
