"""A model made fast whose logits are not its class's own goes the class's own way; the verdict is kept by content."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.models.acceleration import attention, confirmed, fast_forwards, module_forwards, verdicts
from entrenar.models.acceleration.confirmed import make_fast
from entrenar.models.acceleration.in_float32 import in_float32
from entrenar.models.acceleration.swapped import own_way, swapped
from tests.support.families import make_family

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that verdicts are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "entrenar" / "forwards"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every comparison."""
    done: list[str] = []
    own = confirmed._agrees
    monkeypatch.setattr(confirmed, "_agrees", lambda *args: done.append("") or own(*args))
    return done


def frozen(family: str, dtype: torch.dtype) -> PreTrainedModel:
    return make_family(family, dtype, initializer_range=0.1).requires_grad_(False)


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def wrong_norms(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let every norm's forward be off by a factor, and nothing notice it module by module."""
    own = module_forwards._norm
    monkeypatch.setattr(module_forwards, "_norm", lambda *args, **options: own(*args, **options) * factor)
    monkeypatch.setattr(fast_forwards, "agree", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "phi3", "gemma2", "cohere"])
def test_right_forwards_stay(family: str, dtype: torch.dtype, runs: list[str], kept: Path) -> None:
    model = frozen(family, dtype)
    make_fast(model)
    assert swapped(model)
    assert len(runs) == 1
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.02, 2.0])
def test_wrong_ones_all_go(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = frozen("gemma", dtype)
    for again in range(2):  # the second time from the verdict that was kept
        model = copy.deepcopy(plain)
        with monkeypatch.context() as patch:
            wrong_norms(patch, factor)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                make_fast(model)
            if again:
                patch.setattr(confirmed, "_agrees", lambda *_: 1 / 0)
        assert [record.getMessage() for record in caplog.records] == [
            "the faster forwards of GemmaForCausalLM give other logits than its class's own: everything goes the "
            "class's own way, which is slower"
        ]
        assert not swapped(model)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(logits(model), logits(plain))


def test_wrong_kernels_of_bfloat16_alone_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right in float32 is not thereby right in the run's dtype."""
    model = frozen("llama", torch.bfloat16)
    own = module_forwards._norm

    def off(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return own(x, *args, **options) * (1.2 if x.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(module_forwards, "_norm", off)
    monkeypatch.setattr(fast_forwards, "agree", lambda *_: True)
    make_fast(model)
    assert not swapped(model)


def test_the_second_time_costs_nothing(runs: list[str]) -> None:
    plain = frozen("llama", torch.float32)
    for _ in range(3):
        make_fast(copy.deepcopy(plain))
    assert len(runs) == 1


@pytest.mark.parametrize("change", ["weight", "config", "dtype", "code"])
def test_a_verdict_is_of_one_content(change: str, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = frozen("llama", torch.float32)
    make_fast(copy.deepcopy(plain))
    other = copy.deepcopy(plain)
    if change == "weight":
        other.get_parameter("model.norm.weight")[3] += 1e-3
    elif change == "config":
        other.config.rope_parameters["rope_theta"] = 5.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    elif change == "dtype":
        other.bfloat16()
    else:
        monkeypatch.setattr(verdicts, "_code", lambda: "another version")
    make_fast(other)
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"agrees": 3}', '{"agrees": tru', "[1]", '{"agrees": null}'])
def test_what_cannot_be_read_is_no_verdict(text: str, runs: list[str], kept: Path) -> None:
    plain = frozen("llama", torch.float32)
    make_fast(copy.deepcopy(plain))
    (file,) = kept.iterdir()
    file.write_text(text)
    make_fast(copy.deepcopy(plain))
    assert len(runs) == 2
    assert file.read_text() == '{"agrees": true}\n'


def test_without_a_place_nothing_is_kept(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    plain = frozen("llama", torch.float32)
    for place in (str(tmp_path / "file"), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
        make_fast(copy.deepcopy(plain))
    assert len(runs) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_its_own_way_and_back() -> None:
    plain = frozen("llama", torch.bfloat16)
    fast = copy.deepcopy(plain)
    make_fast(fast)
    before, replaced = logits(fast), set(swapped(fast))
    with own_way(fast):
        assert torch.equal(logits(fast), logits(plain))
    assert set(swapped(fast)) == replaced
    assert fast.config._attn_implementation == attention.NAME
    assert torch.equal(logits(fast), before)


def test_float32_for_a_while() -> None:
    model = frozen("gemma3_text", torch.bfloat16)
    wide = copy.deepcopy(model).float()
    with torch.no_grad(), in_float32(model):
        found = model(input_ids=IDS, use_cache=False).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(wide), rtol=1e-2, atol=1e-3)  # but for the embedding's factor
    assert model(input_ids=IDS, use_cache=False).logits.dtype == torch.bfloat16
    assert not any(module._forward_hooks for module in model.modules())
