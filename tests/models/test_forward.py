"""Logits only where a prediction is wanted are those of the whole forward pass, and so is the loss."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.layers import linear_cross_entropy
from entrenar.lora.attach import attach_lora
from entrenar.models import forward
from entrenar.models.forward import target_logits, target_loss
from entrenar.opening.load import load
from tests.support.families import FAMILIES, MIXING, make_family
from tests.support.recorder import Recorder

# Three rows of 6 tokens, one document each, and which of them are targets.
_POSITIONS = torch.arange(6).repeat(3, 1)
_TARGETS = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def _llama(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory)


def _gemma2(_: Path) -> PreTrainedModel:
    """An architecture that bends its logits after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def _run(model: PreTrainedModel, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(1))
    logits, labels = target_logits(model, ids, _POSITIONS, targets)
    whole = model(input_ids=ids).logits
    rows, columns = targets.nonzero(as_tuple=True)
    assert labels.tolist() == ids[rows, columns].tolist()
    return logits, whole[rows, columns - 1], ids


@pytest.mark.parametrize("make", [_llama, _gemma2])
def test_logits_are_those_that_predict_the_targets(
    tiny_model_dir: Path, make: Callable[[Path], PreTrainedModel]
) -> None:
    model = make(tiny_model_dir)
    logits, expected, _ = _run(model, _TARGETS)
    assert logits.shape == (3, model.config.get_text_config().vocab_size)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_whole_pass(tiny_model_dir: Path) -> None:
    model = _llama(tiny_model_dir)
    logits, expected, _ = _run(model, _TARGETS)
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    ours, theirs = (torch.autograd.grad(values.square().sum(), weight)[0] for values in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_head_runs_only_on_the_columns_some_row_needs(tiny_model_dir: Path) -> None:
    model = _llama(tiny_model_dir)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    shapes = []
    head.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    target_logits(model, torch.ones(3, 6, dtype=torch.int64), _POSITIONS, _TARGETS)
    assert shapes == [(3, 3, 64)]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES | MIXING)
def test_padding_changes_nothing(name: str) -> None:
    """Nothing looks ahead to it, whether or not the architecture keeps documents apart."""
    model = make_family(name, initializer_range=0.05)
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    targets = torch.tensor([[False, False, True, True, True]])
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, 1:4]
    padded = [nn.functional.pad(tensor, (0, 4)) for tensor in (ids, targets)]
    together, _ = target_logits(model, padded[0], torch.arange(9)[None], padded[1])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_choose_positions_is_an_input_error() -> None:
    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            raise AssertionError("not to be run")

    with pytest.raises(InputError, match="Fixed cannot make logits for chosen positions"):
        target_logits(cast(PreTrainedModel, Fixed()), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))


# Architecture → what sets it apart from a plain head.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "smollm3": {},
    "phi": {"tie_word_embeddings": False},  # a head with bias
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16},
    "gemma3_text": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "num_hidden_layers": 1, "block_types": ["recurrent"]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "minicpm3": {  # scales what enters the head
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def _make(name: str, **more: Any) -> PreTrainedModel:
    """A tiny random model with weights large enough that its logits are far from equal."""
    common = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(",")[0], **{**common, **_ARCHITECTURES[name], **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _inputs(rows: int = 3, length: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and targets of rows of unlike length, some positions of which are not trained."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    real = torch.arange(length) < torch.arange(length, length - rows, -1)[:, None]
    targets = (torch.rand(rows, length, generator=generator) < 0.6) & real
    targets[:, 0] = False
    return ids, torch.arange(length).repeat(rows, 1), targets


def _their_loss(model: PreTrainedModel, ids: Tensor, _: Tensor, targets: Tensor) -> Tensor:
    """transformers' own, a mean, times the count."""
    loss = model(input_ids=ids, labels=ids.masked_fill(~targets, -100), use_cache=False).loss
    return loss * targets.sum()


def _whole_loss(model: PreTrainedModel, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Of all target logits at once."""
    logits, labels = target_logits(model, ids, positions, targets)
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _assert_same(model: PreTrainedModel, ours: Tensor, theirs: Tensor, tolerance: float = 5e-6) -> None:
    """Loss to 1e-6; the gradient of every parameter, through float32 layers, to `tolerance` of its largest entry."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    expected, got = _gradients(theirs, model), _gradients(ours, model)
    assert got.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four positions of 100 float32 logits."""
    monkeypatch.setattr(linear_cross_entropy, "LOGIT_BYTES", 4 * 100 * 4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_the_loss_is_transformers_own(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = _make(name), _inputs()
    _assert_same(model, target_loss(model, *inputs), _their_loss(model, *inputs))
    with torch.no_grad():
        assert target_loss(model, *inputs).item() == pytest.approx(_their_loss(model, *inputs).item(), rel=1e-6)
    assert not [record for record in caplog.records if record.name.startswith("entrenar")]  # none took a slower way


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["llama, untied", "gemma2", "cohere", "phi"])
def test_a_head_with_an_adapter_is_trained_too(name: str) -> None:
    model, inputs = _make(name), _inputs()
    attach_lora(model, rank=4, alpha=8, targets=["q_proj", "lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    _assert_same(model, target_loss(model, *inputs), _their_loss(model, *inputs))
    assert model.get_parameter("lm_head.lora_a").grad is not None


def test_rows_without_a_target_have_no_loss() -> None:
    model = _make("llama")
    ids, positions, targets = _inputs()
    loss = target_loss(model, ids, positions, torch.zeros_like(targets))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in _gradients(loss, model).values())


@pytest.mark.usefixtures("small_chunks")
def test_half_precision_is_the_whole_pass_in_half_precision(tiny_model_dir: Path) -> None:
    """The same bfloat16 hidden states and head: only the order of sums and one rounding of the gradient differ."""
    model, _ = load(str(tiny_model_dir), "nf4", dtype="bfloat16")
    attach_lora(model, rank=4, alpha=8)
    inputs = _inputs()
    whole, loss = _whole_loss(model, *inputs), target_loss(model, *inputs)
    assert loss.item() == pytest.approx(whole.item(), rel=2**-9)
    expected, got = _gradients(whole, model), _gradients(loss, model)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 2**-6 * gradient.norm(), name


def test_the_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 2000
    monkeypatch.setattr(linear_cross_entropy, "LOGIT_BYTES", 20 * vocabulary * 4)
    model, inputs = _make("gemma2", vocab_size=vocabulary), _inputs(rows=8, length=60)
    attach_lora(model, rank=4, alpha=8)
    logits = int(inputs[2].sum()) * vocabulary * 4
    with Recorder() as ours, torch.enable_grad():
        target_loss(model, *inputs).backward()
    with Recorder() as theirs:
        _their_loss(model, *inputs).backward()
    assert max(ours.sizes) < logits / 4
    assert max(theirs.sizes) > logits


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [False, True])
def test_logits_that_are_changed_in_another_way_go_through_the_models_own_code(
    trained: bool, bent: Callable[..., PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    factor = nn.Parameter(torch.tensor(0.5), requires_grad=trained)
    model, inputs = bent(lambda z: (z * factor).clamp(-3, 3)), _inputs()
    model.register_parameter("factor", factor)
    forward._say_once.cache_clear()
    for _ in range(2):
        _assert_same(model, target_loss(model, *inputs), _whole_loss(model, *inputs))
    assert [record.message for record in caplog.records if "changes them" in record.message] == [
        "BentLlama neither scales nor softcaps its logits but changes them: a slower loss"
    ]


def test_changed_logits_too_are_made_in_chunks(
    bent: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = bent(lambda z: z.clamp(-3, 3)), _inputs(rows=8, length=60)
    attach_lora(model, rank=4, alpha=8)
    vocabulary = model.config.get_text_config().vocab_size
    monkeypatch.setattr(linear_cross_entropy, "LOGIT_BYTES", 8 * vocabulary * 4)
    with Recorder() as recorded:
        target_loss(model, *inputs).backward()
    # What else is large are the scores of attention and the MLP's activations, which know nothing of the vocabulary.
    assert not [size for size in recorded.sizes if size % (vocabulary * 4) == 0 and size > 8 * vocabulary * 4]


class HeadlessLlama(LlamaForCausalLM):
    """Uses its head's weight and does not call its head."""

    def forward(self, input_ids: Any, use_cache: bool, logits_to_keep: Any = slice(None)) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden = self.model(input_ids).last_hidden_state[:, logits_to_keep]
        return SimpleNamespace(logits=self.run_head(hidden))

    def run_head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.lm_head.weight.T


class FlatLlama(HeadlessLlama):
    """Gives its head all rows as one."""

    def run_head(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden.flatten(0, 1))
        return logits if logits.ndim == 3 else logits.unflatten(0, hidden.shape[:2])


@pytest.mark.parametrize("kind", [HeadlessLlama, FlatLlama])
def test_a_model_whose_head_cannot_be_run_alone_makes_all_logits(
    kind: type[HeadlessLlama], tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = kind.from_pretrained(tiny_model_dir), _inputs()
    forward._say_once.cache_clear()
    _assert_same(model, target_loss(model, *inputs), _whole_loss(model, *inputs))
    assert f"{kind.__name__} has no head that can be run alone" in caplog.text
