"""Cross-entropy a chunk of positions at a time: F.cross_entropy of all logits in value and gradient, not in memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entrenar.layers import linear_cross_entropy as module
from entrenar.layers.linear_cross_entropy import LogitRule, chunk_rows, linear_cross_entropy
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.qlora_layer import QLoRALayer
from entrenar.ops.cross_entropy.operation import cross_entropy_rows
from entrenar.quant.tensor import quantize
from tests.support.recorder import Recorder

RULES = [LogitRule(), LogitRule(0.25), LogitRule(softcap=2.0), LogitRule(3.0, 1.5)]
N, H, V = 13, 64, 50


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels_for(n: int, v: int) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(9))


def plain(v: int = V, h: int = H, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    head = nn.Linear(h, v, bias, dtype=dtype)
    head.weight.data.copy_(random(v, h, seed=1) / math.sqrt(h))
    if bias:
        head.bias.data.copy_(random(v, seed=2))
    return head


def _awake(layer: AdapterLayer) -> AdapterLayer:
    layer.lora_a.data.copy_(random(*layer.lora_a.shape, seed=4) / math.sqrt(H))
    layer.lora_b.data.copy_(random(*layer.lora_b.shape, seed=5) * 0.2)
    return layer


def lora(v: int = V, dropout: float = 0.0) -> AdapterLayer:
    return _awake(LoRALayer(plain(v).weight, rank=3, alpha=6, dropout=dropout, bias=plain(v).bias))


def qlora(v: int = V) -> AdapterLayer:
    return _awake(QLoRALayer(plain(v).weight, rank=3, alpha=6))


def quantized() -> QuantizedLinear:
    return QuantizedLinear(quantize(plain().weight.detach(), format="nf4", block_size=64, double_quant=False))


HEADS: dict[str, Callable[..., nn.Module]] = {
    "trained": plain,
    "trained, no bias": lambda: plain(bias=False),
    "frozen": lambda v=V: plain(v).requires_grad_(False),
    "bias alone": lambda: _weight_frozen(plain()),
    "LoRA": lora,
    "QLoRA": qlora,
    "quantized": quantized,
    "not quite linear": lambda: nn.Sequential(plain(), nn.Tanh()),
}


def _weight_frozen(head: nn.Linear) -> nn.Linear:
    head.weight.requires_grad_(False)
    return head


@pytest.fixture
def chunk_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let a chunk be (rows, vocabulary) float32."""
    return lambda rows, v: monkeypatch.setattr(module, "LOGIT_BYTES", rows * v * 4)


def whole(hidden: Tensor, head: nn.Module, labels: Tensor, rule: LogitRule) -> Tensor:
    """The definition, over all logits at once."""
    logits = head(hidden) * rule.scale
    logits = logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    """Of 0.3 · loss: the backward has something to scale."""
    wanted = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    return list(torch.autograd.grad(0.3 * loss, wanted))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """To `tolerance` of the largest expected value."""
    assert got.shape == expected.shape
    if expected.numel():
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    kind: str, rule: LogitRule, chunk_of: Callable[[int, int], None]
) -> None:
    chunk_of(4, V)
    head, hidden, labels = HEADS[kind](), random(N, H, seed=3).requires_grad_(), labels_for(N, V)
    loss, expected = linear_cross_entropy(hidden, head, labels, V, rule), whole(hidden, head, labels, rule)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, reference in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert_close(got, reference)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 20), h=st.integers(1, 9), v=st.integers(1, 30), rows=st.integers(0, 25), bias=st.booleans())
def test_any_size_in_any_chunks(
    n: int, h: int, v: int, rows: int, bias: bool, chunk_of: Callable[[int, int], None]
) -> None:
    chunk_of(rows, v)
    head, hidden, labels = plain(v, h, bias).double(), random(n, h, seed=3).double().requires_grad_(), labels_for(n, v)
    rule = LogitRule(0.5, 3.0)
    loss, expected = linear_cross_entropy(hidden, head, labels, v, rule), whole(hidden, head, labels, rule)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden, head), gradients(expected, hidden, head))


@given(n=st.integers(0, 5000), v=st.integers(1, 300_000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_chunks_fit_the_budget_and_are_about_equal(n: int, v: int, dtype: torch.dtype) -> None:
    rows = chunk_rows(n, v, dtype)
    assert rows == 1 or rows * v * dtype.itemsize <= module.LOGIT_BYTES
    chunks = [min(rows, n - start) for start in range(0, n, rows)]
    assert sum(chunks) == n
    assert all(chunk <= rows for chunk in chunks)
    assert len(chunks) <= 1 or chunks[-1] > rows - len(chunks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [plain, lora])
def test_gradcheck(make: Callable[[], nn.Module], rule: LogitRule, chunk_of: Callable[[int, int], None]) -> None:
    chunk_of(4, 2 * V)  # two rows of float64
    head, labels = make().double(), labels_for(5, V)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    hidden = random(5, H, seed=3).double().requires_grad_()
    # gradcheck moves its inputs in place, and the head holds them.
    assert torch.autograd.gradcheck(
        lambda x, *_: linear_cross_entropy(x, head, labels, V, rule), (hidden, *trained), fast_mode=True
    )


def test_a_second_derivative_is_refused() -> None:
    hidden, head = random(N, H).requires_grad_(), plain()
    loss = linear_cross_entropy(hidden, head, labels_for(N, V), V)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_backward_twice_gives_the_same(chunk_of: Callable[[int, int], None]) -> None:
    chunk_of(4, V)
    hidden, head = random(N, H).requires_grad_(), plain()
    loss = linear_cross_entropy(hidden, head, labels_for(N, V), V)
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_are_computed_in_float32_and_their_gradient_is_rounded_once(
    dtype: torch.dtype, softcap: float | None
) -> None:
    logits, labels = random(N, V, dtype=dtype) * 4, labels_for(N, V)
    wide = logits.clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = F.cross_entropy(LogitRule(softcap=softcap)(wide), labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    losses = cross_entropy_rows(logits, labels, softcap or 0.0)
    assert losses.dtype == expected.dtype
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_is_right_to_the_rounding_of_its_logits(
    dtype: torch.dtype, unit: float, rule: LogitRule, chunk_of: Callable[[int, int], None]
) -> None:
    """A logit z is rounded by `unit`·|z| at most and its gradient d once more: d(1 + 2·max|z|)·unit, through |W|."""
    chunk_of(2, V)  # four rows of two bytes
    head, labels = plain(dtype=dtype).requires_grad_(False), labels_for(N, V)
    hidden = random(N, H, seed=3, dtype=dtype).requires_grad_()
    exact, wide = hidden.detach().double().requires_grad_(), plain(dtype=dtype).double()
    logits = rule(wide(exact).detach()).requires_grad_()
    largest = wide(exact).abs().max().item() * max(rule.scale, 1)
    (d_logits,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    loss, expected = linear_cross_entropy(hidden, head, labels, V, rule), whole(exact, wide, labels, rule)
    assert loss.item() == pytest.approx(expected.item(), abs=2 * N * largest * 2 * unit)
    got, reference = (torch.autograd.grad(value, x)[0].double() for value, x in ((loss, hidden), (expected, exact)))
    reach = d_logits.abs() @ wide.weight.detach().abs() * max(rule.scale, 1)
    assert ((got - reference).abs() <= (2 + 4 * largest) * unit * reach + unit * reference.abs()).all()


@pytest.fixture
def record() -> Callable[..., Any]:
    """Forward and backward of n positions under a Recorder, which is returned."""

    def run(n: int, head: nn.Module, v: int = V, h: int = H, wants_hidden: bool = True) -> Any:
        hidden, labels = random(n, h, seed=3).requires_grad_(wants_hidden), labels_for(n, v)
        with Recorder() as recorded:
            loss = linear_cross_entropy(hidden, head, labels, v, LogitRule(0.5, 3.0))
            if loss.requires_grad:
                loss.backward()
        return recorded

    return run


@pytest.mark.parametrize("kind", ["trained", "frozen", "LoRA", "QLoRA"])
def test_no_tensor_is_larger_than_a_chunk_or_a_gradient(
    kind: str, chunk_of: Callable[[int, int], None], record: Callable[..., Any]
) -> None:
    chunk_of(8, 500)
    n, v, h = 640, 500, 64
    assert max(record(n, HEADS[kind](v), v, h).sizes) <= max(8 * v, n * h, v * h) * 4 < n * v * 4 / 5


@pytest.mark.parametrize(("kind", "a_chunk"), [("trained", 3), ("frozen", 2), ("bias alone", 2)])
def test_products_are_made_only_for_what_is_trained(
    kind: str, a_chunk: int, chunk_of: Callable[[int, int], None], record: Callable[..., Any]
) -> None:
    chunk_of(4, V)
    chunks = math.ceil(N / 4)
    assert record(N, HEADS[kind]()).products == a_chunk * chunks
    with torch.no_grad():
        assert record(N, HEADS[kind]()).products == chunks
    assert record(N, HEADS[kind](), wants_hidden=False).products == (a_chunk - 1) * chunks


def test_a_frozen_heads_weight_is_never_copied(
    chunk_of: Callable[[int, int], None], record: Callable[..., Any]
) -> None:
    chunk_of(2, V)
    assert max(record(4, HEADS["frozen"]()).sizes) < V * H * 4


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rule", RULES)
def test_without_gradient_the_loss_is_the_same(
    kind: str, rule: LogitRule, chunk_of: Callable[[int, int], None]
) -> None:
    chunk_of(4, V)
    head, hidden, labels = HEADS[kind](), random(N, H, seed=3).requires_grad_(), labels_for(N, V)
    expected = linear_cross_entropy(hidden, head, labels, V, rule)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, labels, V, rule)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_dropout_in_the_head_is_that_of_the_seed() -> None:
    head, hidden, labels = lora(dropout=0.5), random(N, H, seed=3).requires_grad_(), labels_for(N, V)
    torch.manual_seed(0)
    loss = linear_cross_entropy(hidden, head, labels, V)
    torch.manual_seed(0)
    expected = whole(hidden, head, labels, LogitRule())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, reference in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert_close(got, reference)


def test_a_head_alone_can_be_trained(chunk_of: Callable[[int, int], None]) -> None:
    chunk_of(4, V)
    for head in (plain(), lora()):
        hidden, labels = random(N, H, seed=3), labels_for(N, V)
        loss, expected = (f(hidden, head, labels, V) for f in (linear_cross_entropy, _whole_plain))
        for got, reference in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
            assert_close(got, reference)


def _whole_plain(hidden: Tensor, head: nn.Module, labels: Tensor, _: int) -> Tensor:
    return whole(hidden, head, labels, LogitRule())
