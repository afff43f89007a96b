"""fisher and regmean from files: measured on a text as autograd and forward hooks of transformers alone measure it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import entrenar
from entrenar.core.errors import InputError
from entrenar.evaluation import weight_statistics
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import attach_lora
from entrenar.merging import execute
from entrenar.opening import compute
from entrenar.recipes import merge_statistics
from tests.support.mixtures import save_mixture

ROW = 48
TEXT = "switch on the lamp, then check the heater and reset my clock. " * 12


@pytest.fixture(autouse=True)
def short_rows_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "native_dtype", lambda _: torch.float32)
    monkeypatch.setattr(merge_statistics, "ROW", ROW)
    monkeypatch.setattr(merge_statistics, "MAX_ROWS", 3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def neighbour(tiny_model_dir: Path, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    values = load_file(tiny_model_dir / "model.safetensors")
    moved = {name: x + 0.05 * torch.randn(x.shape, generator=generator) for name, x in values.items()}
    directory = tmp_path / "neighbour"
    directory.mkdir()
    save_file(moved, directory / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny_model_dir / name).read_bytes())
    return directory


def config(method: str, text: Path | None, *models: str | Path, **shared: object) -> dict[str, object]:
    named = [{"model": str(model), "parameters": {"weight": 1 + i}} for i, model in enumerate(models)]
    parameters = {**shared, **({"text": str(text)} if text else {})}
    return {"merge_method": method, "models": named, "parameters": parameters, "dtype": "float32"}


def opened(directory: Path) -> tuple[PreTrainedModel, list[Tensor]]:
    """transformers' own model in float64, and the rows of the text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"][: 3 * ROW])
    return model, list(ids.split(ROW))


def squares(directory: Path) -> dict[str, Tensor]:
    model, rows = opened(directory)
    totals = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            totals[name] += parameter.grad.square() / len(rows)
    return totals


def products(directory: Path, layer: str) -> Tensor:
    model, rows = opened(directory)
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    x = torch.cat(seen)
    return x.T @ x / len(x)


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: x.double().numpy() for name, x in load_file(directory / "model.safetensors").items()}


Weights = dict[str, np.ndarray]


def merged_two(asked: dict[str, object], models: Sequence[Path], output: Path) -> tuple[Weights, list[Weights]]:
    """The result's weights and the models'."""
    entrenar.merge(asked, output)
    return weights(output), [weights(model) for model in models]


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_fisher_weighs_by_transformers_own_squared_gradients(
    tiny_model_dir: Path, neighbour: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(weight_statistics, "GROUP_BYTES", group_bytes)
    models = (tiny_model_dir, neighbour)
    found, values = merged_two(config("fisher", text, *models), models, tmp_path / "merged")
    information = [squares(model) for model in models]
    assert found.keys() == values[0].keys()
    for name, merged in found.items():
        f1, f2 = (each[name].numpy() * (1 + i) for i, each in enumerate(information))
        plain = (values[0][name] + 2 * values[1][name]) / 3
        weighed = (f1 * values[0][name] + f2 * values[1][name]) / np.where(f1 + f2 > 0, f1 + f2, 1)
        expected = np.where(f1 + f2 > 0, weighed, plain)
        seen = f1 + f2 > 1e-6 * (f1 + f2).max()  # float32's gradients have no say in smaller ones
        np.testing.assert_allclose(merged[seen], expected[seen], rtol=0, atol=2e-3)
        assert np.abs(merged - plain).max() > 1e-3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_regmean_solves_over_transformers_own_inputs(
    tiny_model_dir: Path, neighbour: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(weight_statistics, "GROUP_BYTES", group_bytes)
    models = (tiny_model_dir, neighbour)
    found, values = merged_two(config("regmean", text, *models, alpha=0.8), models, tmp_path / "merged")
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        name = f"{layer}.weight"
        grams = [0.8 * g + 0.2 * np.diag(np.diag(g)) for g in (products(model, layer).numpy() for model in models)]
        left, right = grams[0] + 2 * grams[1], values[0][name] @ grams[0] + 2 * values[1][name] @ grams[1]
        np.testing.assert_allclose(found[name], np.linalg.solve(left, right.T).T, rtol=1e-3, atol=1e-3)
    name = "model.layers.0.input_layernorm.weight"
    np.testing.assert_allclose(found[name], (values[0][name] + 2 * values[1][name]) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_an_adapter_is_measured_as_the_model_it_makes(
    tiny_model_dir: Path, text: Path, tmp_path: Path, method: str
) -> None:
    model, _ = entrenar.load(str(tiny_model_dir), "none", dtype="float32")
    attach_lora(model, rank=2, alpha=4, targets=["q_proj", "down_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    adapted = f"{tiny_model_dir}+{tmp_path / 'adapter'}"
    entrenar.merge(config("linear", None, adapted), tmp_path / "fused")
    entrenar.merge(config(method, text, tiny_model_dir, adapted), tmp_path / "one")
    entrenar.merge(config(method, text, tiny_model_dir, tmp_path / "fused"), tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-3)


def test_every_model_may_have_a_text_of_its_own(
    tiny_model_dir: Path, neighbour: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    asked = config("fisher", text, tiny_model_dir, neighbour)
    own: list[dict[str, object]] = [
        {"model": str(model), "parameters": {"weight": 1 + i, "text": str(text if i == 0 else other)}}
        for i, model in enumerate((tiny_model_dir, neighbour))
    ]
    entrenar.merge(asked, tmp_path / "one")
    entrenar.merge(asked | {"models": own, "parameters": {}}, tmp_path / "each")
    one, each = weights(tmp_path / "one"), weights(tmp_path / "each")
    assert any((one[name] != each[name]).any() for name in one)
    told = json.loads(str(entrenar.inspect(tmp_path / "each").metadata["entrenar.merge"]))
    assert len(set(told["measured_on"].values())) == 2


def test_a_merge_that_was_stopped_measures_nothing_again(
    tiny_model_dir: Path, neighbour: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config("fisher", text, tiny_model_dir, neighbour)
    entrenar.merge(asked, tmp_path / "straight")
    runs: list[int] = []
    measure = weight_statistics.squared_gradients

    def counted(model: PreTrainedModel, rows: Sequence[Tensor]) -> object:
        runs.append(1)
        return measure(model, rows)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_statistics, "squared_gradients", counted)
    with monkeypatch.context() as patch:
        patch.setattr(execute, "merge_tensor", stop)
        with pytest.raises(KeyboardInterrupt):
            entrenar.merge(asked, tmp_path / "merged")
    assert len(runs) == 2
    entrenar.merge(asked, tmp_path / "merged")
    assert len(runs) == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "merged"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("change", "message"), [
    ({"parameters": {}}, "fisher measures every model on one small text, and .*tiny-llama.* has not one"),
    ({"parameters": {"text": [{"filter": "mlp", "value": "a.txt"}, {"value": "b.txt"}]}}, "has not one: give its file"),
    ({"parameters": {"text": "missing.txt"}}, "cannot read the text missing.txt to measure .*tiny-llama.* on"),
    ({"tokenizer_source": "base"}, "fisher merges models of one vocabulary only"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    tiny_model_dir: Path, neighbour: Path, text: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    asked = config("fisher", text, tiny_model_dir, neighbour) | change
    for run in (entrenar.merge, entrenar.merge.plan):
        with pytest.raises(InputError, match=message):
            run(asked, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_a_mixture_of_experts_is_refused(text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its experts are no linear layers of the loaded model: they would be averaged without a word."""
    save_mixture("mixtral", tmp_path / "base", tiny_tokenizer)
    with pytest.raises(InputError, match="is a mixture of experts, which regmean does not measure"):
        entrenar.merge(config("regmean", text, tmp_path / "base"), tmp_path / "merged")
    assert not list(tmp_path.glob(".*"))
