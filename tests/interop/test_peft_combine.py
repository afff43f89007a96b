"""Combined adapters against peft's add_weighted_adapter: the same change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from entrenar.lora.attach import adapted_layers
from entrenar.lora.several import Adapters

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
WEIGHTS = {"a": 0.7, "b": 1.5}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(WEIGHTS):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"]))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(tmp_path / name))
    return {name: tmp_path / name for name in WEIGHTS}


def theirs(directories: dict[str, Path], method: str, **options: Any) -> dict[str, Tensor]:
    model: Any = PeftModel.from_pretrained(base(), directories["a"], adapter_name="a")  # pyright: ignore[reportArgumentType]
    model.load_adapter(directories["b"], adapter_name="b")
    model.base_model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "c", combination_type=method, **options
    )
    modules: dict[str, Any] = dict(model.base_model.model.named_modules())
    return {name: modules[name].get_delta_weight("c") for name in ("0", "2")}


@pytest.mark.parametrize(
    ("method", "peer", "options", "peer_options"),
    [
        ("linear", "linear", {}, {}),
        ("cat", "cat", {}, {}),
        ("svd", "svd", {"rank": 4}, {"svd_rank": 4}),
        ("ties", "ties_svd", {"rank": 6, "density": 0.4}, {"svd_rank": 6, "density": 0.4}),
    ],
)
def test_the_change_is_pefts(
    directories: dict[str, Path], method: str, peer: str, options: dict[str, Any], peer_options: dict[str, Any]
) -> None:
    check_change(directories, method, peer, options, peer_options)


@pytest.mark.parametrize(("method", "peer"), [("dare", "dare_linear_svd"), ("dare_ties", "dare_ties_svd")])
@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_what_dare_drops_aside_the_change_is_pefts(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: str, peer: str, density: float
) -> None:
    """Both draw the same masks: peft's are drawn from a generator like ours."""
    generator = torch.Generator().manual_seed(5)

    def drop(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return tensor * (torch.rand(tensor.shape, generator=generator) < density) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", drop)
    options = {"rank": 16, "density": density, "seed": 5}
    check_change(directories, method, peer, options, {"svd_rank": 16, "density": density})


def check_change(
    directories: dict[str, Path], method: str, peer: str, options: dict[str, Any], peer_options: dict[str, Any]
) -> None:
    model = base()
    adapters = Adapters(model)
    for name, directory in directories.items():
        adapters.load(directory, name)
    adapters.combine(WEIGHTS, "c", method, **options)
    adapters.use("c")
    expected = theirs(directories, peer, **peer_options)
    for name, layer in adapted_layers(model):
        found = layer.merge_to_f32() - layer.base_to_f32()
        assert torch.allclose(found, expected[name], atol=1e-4), (found - expected[name]).abs().max()
