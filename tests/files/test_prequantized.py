"""The seam for checkpoints that come quantized: a second, tiny kind is opened, loaded, planned, merged and exported."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import entrenar
from entrenar.core.errors import InputError
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.prequantized import PREQUANTIZED, WRITTEN, PrequantizedKind
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.opening.as_stored import weights_as_stored
from entrenar.opening.build import build_on_meta
from entrenar.opening.source import open_source
from entrenar.planning.fixed import base_bytes
from entrenar.quant.scales import as_bytes, as_float
from entrenar.quant.tensor import QuantizedTensor
from entrenar.recipes.config import ModelSection

SCALE = ".toy_scale"


@dataclass(frozen=True)
class ToyWeight:
    """int8 codes (out, in) and a float32 scale a row."""

    codes: StoredTensor
    scale: StoredTensor
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self) -> QuantizedTensor:
        codes = self.codes.read().to(torch.int8).view(torch.uint8).flatten()
        parts = {"codes": codes, "scales": as_bytes(self.scale.read())}
        return QuantizedTensor("int8", self.shape, self.dtype, self.shape[1], parts)

    def read_range(self, start: int, count: int) -> Tensor:
        return self.read().dequantize().flatten()[start : start + count]


class ToyWeights:
    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self.checkpoint, self.stored = checkpoint, checkpoint.stored
        self._quantized = [name.removesuffix(SCALE) for name in checkpoint.names() if name.endswith(SCALE)]

    def names(self) -> list[str]:
        return [name for name in self.checkpoint.names() if not name.endswith(SCALE)]

    def formats(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: ("int8", self.stored(name).shape) for name in self._quantized}

    def weight(self, name: str) -> ToyWeight:
        return ToyWeight(self.stored(name), self.stored(name + SCALE))

    def bytes_of(self, name: str) -> int:
        return self.stored(name).numel + 4 * self.stored(name + SCALE).numel


def is_toy(names: Iterable[str]) -> bool:
    return any(name.endswith(SCALE) for name in names)


TOY = PrequantizedKind(
    describes=lambda section: section.get("quant_method") == "toy",
    recognises=is_toy,
    claims=lambda name, names: name + SCALE in names,
    weight_of=lambda name: name.removesuffix(SCALE),
    open=ToyWeights,
)


class ToyLayout:
    """The same written."""

    def quantize(self, name: str, weight: Tensor) -> QuantizedTensor:
        scale = weight.float().abs().amax(1) / 127
        codes = (weight.float() / scale[:, None]).round().to(torch.int8).view(torch.uint8).flatten()
        shape = (weight.shape[0], weight.shape[1])
        return QuantizedTensor("int8", shape, torch.float32, shape[1], {"codes": codes, "scales": as_bytes(scale)})

    def tensors(self, name: str, shape: tuple[int, int], make: Callable[[], QuantizedTensor]) -> list[LazyTensor]:
        return [
            LazyTensor(name, shape, lambda: make().parts["codes"].view(torch.int8).view(shape), dtype=torch.int8),
            LazyTensor(name + SCALE, (shape[0],), lambda: as_float(make().parts["scales"]), dtype=torch.float32),
        ]

    def config(self, skipped: list[str]) -> dict[str, Any]:
        return {"quant_method": "toy", "skipped": skipped}


@pytest.fixture
def toy(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of that kind, and its weights dequantized."""
    directory = tmp_path / "toy"
    directory.mkdir()
    plain: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for path in tiny_model_dir.iterdir():
        if path.suffix == ".safetensors":
            plain |= load_file(path)
        elif path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    for name, weight in list(plain.items()):
        stored[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(1) / 127
            codes = (weight.float() / scale[:, None]).round().to(torch.int8)
            stored |= {name: codes, name + SCALE: scale}
            plain[name] = codes.float() * scale[:, None]
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "toy"}}))
    return directory, plain


def test_unregistered_it_is_refused_by_name(toy: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(InputError, match="quantized as toy"):
        open_source(str(toy[0]))


@pytest.fixture
def registered() -> Iterator[None]:
    PREQUANTIZED.append(TOY)
    yield
    PREQUANTIZED.remove(TOY)


@pytest.mark.usefixtures("registered")
def test_registered_it_serves_everywhere(toy: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, plain = toy
    source = open_source(str(directory))
    model, _ = entrenar.load(directory, dtype="float32")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        torch.testing.assert_close(layer.quantized_weight.dequantize(), plain[f"{name}.weight"])

    held = sum(tensor.nbytes for tensor in [*model.parameters()])
    counted = base_bytes(model, source, ModelSection(path=str(directory), quantize="none"), torch.float32)
    assert counted == pytest.approx(held, rel=0.01)

    entrenar.attach_lora(model, rank=2, alpha=4)
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

    exported = tmp_path / "exported"
    entrenar.export(str(directory), exported, to="safetensors", type="f32")
    merged = tmp_path / "merged"
    config = tmp_path / "merge.yaml"
    models = [{"model": str(one), "parameters": {"weight": 0.5}} for one in (directory, exported)]
    config.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
    entrenar.merge(config, merged)
    for output in (exported, merged):
        written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
        for name, weight in plain.items():
            torch.testing.assert_close(written[name], weight.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("registered")
def test_what_its_layout_writes_its_reader_reads(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITTEN, "nf4", ToyLayout())
    entrenar.export(str(tiny_model_dir), tmp_path / "toy", to="safetensors", type="nf4")
    written, plain = (entrenar.load(path, dtype="float32")[0] for path in (tmp_path / "toy", tiny_model_dir))
    weights = dict(plain.named_parameters())
    layers = {name: module for name, module in written.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].bfloat16().float()
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((layer.quantized_weight.dequantize() - weight).abs() <= step * 0.501).all()


@pytest.mark.usefixtures("registered")
def test_names_without_the_models_prefix_take_their_scales_along(toy: tuple[Path, dict[str, Tensor]]) -> None:
    directory, plain = toy
    file = directory / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    model, _ = entrenar.load(directory, dtype="float32")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantizedLinear)
    torch.testing.assert_close(layer.quantized_weight.dequantize(), plain["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.usefixtures("registered")
def test_a_second_quantization_is_refused_by_loading_and_planning(
    toy: tuple[Path, dict[str, Tensor]],
) -> None:
    source = open_source(str(toy[0]))
    with pytest.raises(InputError, match="is quantized as int8 already"):
        entrenar.load(toy[0], "nf4")
    with pytest.raises(InputError, match="is quantized as int8 already"):
        weights_as_stored(build_on_meta(source, torch.float32), source, "nf4", torch.float32)
