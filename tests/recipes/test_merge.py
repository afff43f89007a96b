"""Merging as a user calls it: the directory opens in transformers, says where it is from; tensors merge in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import entrenar
from entrenar.cli.merge import _show_report
from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.merging.registry import METHODS
from entrenar.merging.report import KindRow, MergeReport, ParentRow
from entrenar.recipes import export as export_recipe
from entrenar.recipes.export import export
from entrenar.recipes.merge_export import REPORT_NAME


@pytest.fixture
def neighbour(tiny_model_dir: Path, tmp_path: Path) -> str:
    """The tiny model with its matrices moved a little, and a template of its own."""
    values = load_file(tiny_model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    moved = {n: x + 0.01 * torch.randn(x.shape, generator=generator) if x.dim() > 1 else x for n, x in values.items()}
    directory = tmp_path / "neighbour"
    directory.mkdir()
    save_file(moved, directory / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny_model_dir / name).read_bytes())
    return str(directory)


def config(base: Path, other: str, **changes: object) -> dict[str, object]:
    models = [{"model": other, "parameters": {"weight": 1.0, "density": 0.5}}]
    return {"merge_method": "ties", "base_model": str(base), "models": models, "dtype": "bfloat16", **changes}


def test_the_result_is_a_model_that_transformers_opens(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    report = entrenar.merge(config(tiny_model_dir, neighbour, chat_template="{{ messages }}"), output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("lamp")["input_ids"] == AutoTokenizer.from_pretrained(tiny_model_dir)("lamp")["input_ids"]
    norms = next(row for row in report.kinds if row.kind == "model.layers.*.input_layernorm.weight")
    assert norms.parents[0].norm_ratio is None
    matrices = next(row for row in report.kinds if row.kind == "model.layers.*.mlp.up_proj.weight")
    assert matrices.parents[0].cosine == pytest.approx(
        0.93, abs=0.05
    )  # half of a normal's entries hold 93% of its length
    assert json.loads((output / REPORT_NAME).read_text())["of"] == "task vectors"


def test_the_result_says_where_it_is_from(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    entrenar.merge(config(tiny_model_dir, neighbour), tmp_path / "merged", seed=4)
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        noted = file.metadata()
    told = json.loads(noted["entrenar.merge"])
    assert told["seed"] == 4
    assert set(told["inputs"]) == {tiny_model_dir.name, "neighbour"}
    assert "merge_method: ties" in noted["entrenar.merge_config"]
    assert entrenar.inspect(tmp_path / "merged").metadata["entrenar.merge"] == noted["entrenar.merge"]
    assert "merge_method: ties" in (tmp_path / "merged" / "README.md").read_text()


def test_a_plan_reads_headers_and_writes_nothing(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    outlook = entrenar.merge.plan(config(tiny_model_dir, neighbour), tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before
    entrenar.merge(config(tiny_model_dir, neighbour), tmp_path / "merged")
    assert outlook.output_bytes == (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert outlook.method == "ties"
    assert outlook.tensors[0].options["density"] == (0.5,)


def test_what_came_to_nothing_is_remarked(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    slerp = {"merge_method": "slerp", "base_model": str(tiny_model_dir), "models": [{"model": neighbour}]}
    report = entrenar.merge({**slerp, "parameters": {"t": 1.0}}, tmp_path / "end")
    assert report.remarks == ["the result is equal to neighbour: nothing was merged"]
    report = entrenar.merge({**slerp, "parameters": {"t": 0.0}}, tmp_path / "start")
    assert report.remarks == ["the result is equal to the base: nothing was merged"]
    assert entrenar.merge({**slerp, "parameters": {"t": 0.5}}, tmp_path / "middle").remarks == []


def test_every_method_is_there_for_tensors_in_memory() -> None:
    base = torch.randn(4, 6)
    merged = entrenar.merge.ties({"a": base + 1, "b": base + 1}, base, density=0.5)
    assert ((merged - base).abs() > 0.5).sum() == 12
    assert all(getattr(entrenar.merge, name).__doc__ for name in METHODS)
    with pytest.raises(AttributeError, match=r"entrenar\.merge has no method 'tees'"):
        _ = entrenar.merge.tees


def test_a_quantized_directory_is_merged_as_what_it_dequantizes_to(tiny_model_dir: Path, tmp_path: Path) -> None:
    packed = export(str(tiny_model_dir), tmp_path / "nf4", type="nf4")
    expected = load_file(export(str(packed), tmp_path / "f32", type="f32") / "model.safetensors")
    alone = {"merge_method": "linear", "models": [{"model": str(packed), "parameters": {"weight": 1.0}}]}
    entrenar.merge(alone | {"dtype": "float32"}, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "float32"


def test_an_adapter_is_laid_over_a_quantized_directory(tiny_model_dir: Path, tmp_path: Path) -> None:
    packed = str(export(str(tiny_model_dir), tmp_path / "nf4", type="nf4"))
    model, _ = entrenar.load(packed, dtype="float32")
    attach_lora(model, rank=4)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter)
    expected = load_file(export(packed, tmp_path / "f32", adapter=str(adapter), type="f32") / "model.safetensors")
    alone = {"merge_method": "linear", "models": [{"model": f"{packed}+{adapter}", "parameters": {"weight": 1.0}}]}
    entrenar.merge(alone | {"dtype": "float32"}, tmp_path / "merged")
    torch.testing.assert_close(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_the_types_of_a_quantized_directory_are_those_it_stands_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    packed = str(export(str(tiny_model_dir), tmp_path / "nf4", type="nf4"))
    outlook = entrenar.merge.plan(
        {"merge_method": "linear", "models": [{"model": packed, "parameters": {"weight": 1.0}}]}, tmp_path / "merged"
    )
    assert {tensor.dtype for tensor in outlook.tensors} == {torch.bfloat16}


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_a_merge_into_a_gguf_is_the_merged_directory_exported(
    tiny_model_dir: Path, neighbour: str, tmp_path: Path, type: str
) -> None:
    asked = config(tiny_model_dir, neighbour)
    report = entrenar.merge(asked, tmp_path / "merged.gguf", to="gguf", type=type)
    assert entrenar.merge(asked, tmp_path / "merged") == report
    export(str(tmp_path / "merged"), tmp_path / "expected.gguf", to="gguf", type=type)
    found, expected = (entrenar.inspect(tmp_path / f"{name}.gguf") for name in ("merged", "expected"))
    assert found.tensors == expected.tensors
    assert found.metadata | {"general.name": ""} == expected.metadata | {"general.name": ""}
    assert json.loads(str(found.metadata["entrenar.merge"]))["method"] == "ties"
    assert (tmp_path / "merged.gguf").read_bytes()[-4096:] == (tmp_path / "expected.gguf").read_bytes()[-4096:]
    assert json.loads((tmp_path / f"merged.{REPORT_NAME}").read_text())["of"] == "task vectors"
    assert not list(tmp_path.glob(".*"))


def test_a_merge_into_nf4_is_a_directory_that_says_where_it_is_from(
    tiny_model_dir: Path, neighbour: str, tmp_path: Path
) -> None:
    asked = config(tiny_model_dir, neighbour)
    entrenar.merge(asked, tmp_path / "packed", type="nf4")
    entrenar.merge(asked, tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "expected", type="nf4")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "expected"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "entrenar.merge" in entrenar.inspect(tmp_path / "packed").metadata
    assert {REPORT_NAME, "README.md", "tokenizer.json"} <= {file.name for file in (tmp_path / "packed").iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_an_export_that_was_stopped_takes_up_what_was_merged(
    tiny_model_dir: Path, neighbour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, output = config(tiny_model_dir, neighbour), tmp_path / "merged.gguf"
    merged: list[int] = []

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def note(done: int, _: int) -> None:
        merged.append(done)

    with monkeypatch.context() as patch:
        patch.setattr(export_recipe, "export", stop)
        with pytest.raises(KeyboardInterrupt):
            entrenar.merge(asked, output, to="gguf", progress=note)
    assert not output.exists()
    first = len(merged)
    report = entrenar.merge(asked, output, to="gguf", progress=note)
    assert len(merged) == first  # nothing was merged again
    assert report.kinds
    with monkeypatch.context() as patch:
        patch.setattr(export_recipe, "export", stop)
        with pytest.raises(KeyboardInterrupt):
            entrenar.merge(asked, tmp_path / "other.gguf", to="gguf", seed=1, progress=note)
    entrenar.merge(asked, tmp_path / "other.gguf", to="gguf", seed=2, progress=note)
    assert json.loads(str(entrenar.inspect(tmp_path / "other.gguf").metadata["entrenar.merge"]))["seed"] == 2


@pytest.mark.parametrize(("to", "type", "message"), [
    ("gguf", "q9", "gguf has no type 'q9'"),
    ("onnx", None, "cannot export to 'onnx'"),
    ("gguf-adapter", None, "a merge makes a whole model"),
    ("safetensors", "bf16", "set out_dtype there"),
])  # fmt: skip
def test_a_target_that_is_not_there_is_refused_before_anything_is_merged(
    tiny_model_dir: Path, neighbour: str, tmp_path: Path, to: str, type: str | None, message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    for run in (entrenar.merge, entrenar.merge.plan):
        with pytest.raises(InputError, match=message):
            run(config(tiny_model_dir, neighbour), tmp_path / "out", to=to, type=type)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "to", "message"), [
    ("out", "gguf", r"out does not end in \.gguf, by which tools know such a file: write .*out\.gguf"),
    ("out.gguf", "safetensors", r"out\.gguf is the name of a GGUF: give --to gguf"),
])  # fmt: skip
def test_a_name_of_the_other_kind_is_refused_before_anything_is_merged(
    tmp_path: Path, name: str, to: str, message: str
) -> None:
    for run in (entrenar.merge, entrenar.merge.plan):
        with pytest.raises(InputError, match=message):
            run({"not": "even read"}, tmp_path / name, to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_may_be_named_in_capitals(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    entrenar.merge(config(tiny_model_dir, neighbour), tmp_path / "merged.gguf", to="GGUF")
    assert sorted(file.name for file in tmp_path.glob("merged*")) == ["merged.gguf", "merged.merge-report.json"]


def test_what_a_merge_says_is_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    row = KindRow("q\x1b]0;title\x07", 1, 4, [ParentRow("m", 1.0, 1.0)])
    _show_report(MergeReport("weights", [row], ["model \x1b[2J\nadds nothing"]))
    printed = capsys.readouterr().out
    assert r"q\x1b]0;title\x07" in printed
    assert printed.endswith("note: model \\x1b[2J\\nadds nothing\n")


def test_a_result_may_be_called_exported(tiny_model_dir: Path, neighbour: str, tmp_path: Path) -> None:
    entrenar.merge(config(tiny_model_dir, neighbour), tmp_path / "exported", type="nf4")
    assert "model.safetensors" in {file.name for file in (tmp_path / "exported").iterdir()}
