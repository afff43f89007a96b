"""A head that is replaced for one pass shows what reached it and what the model does to logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.linear_cross_entropy import LogitRule
from entrenar.models.head import head_input, output_head, own_logits

Bend = Callable[[Tensor], Tensor]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize(
    ("bend", "rule"),
    [
        (lambda z: z, LogitRule()),
        (lambda z: z * 0.0625, LogitRule(0.0625)),
        (lambda z: z / 13, LogitRule(1 / 13)),
        (lambda z: z.mul_(3), LogitRule(3.0)),
        (lambda z: -z, LogitRule(-1.0)),
        (lambda z: torch.tanh(z / 30) * 30, LogitRule(softcap=30.0)),
        (lambda z: 0.5 * torch.tanh(z / 0.5), LogitRule(softcap=0.5)),
        (lambda z: 15 * torch.tanh(0.2 * z.float() / 15), LogitRule(0.2, 15.0)),
        (lambda z: z.double(), LogitRule()),
    ],
)
def test_scaling_and_softcapping_are_read_off(
    bend: Bend, rule: LogitRule, bent: Callable[..., PreTrainedModel]
) -> None:
    read = head_input(bent(bend), input_ids=IDS)
    assert read is not None
    assert read.rule is not None
    assert read.rule.softcap == (rule.softcap and pytest.approx(rule.softcap, rel=1e-6))
    assert read.rule.scale == pytest.approx(rule.scale, rel=1e-6)
    z = torch.linspace(-50, 50, 101)
    torch.testing.assert_close(read.rule(z), bend(z.clone()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bend",
    [
        lambda z: z + 1e-3,
        lambda z: z[..., :-1],
        lambda z: z.clamp(-100, 100),
        lambda z: z.clamp_(-100, 100),
        lambda z: z.log_softmax(-1),
        lambda z: z * torch.where(torch.arange(z.shape[-1]) == 7, 1.001, 1.0),
        lambda z: z.masked_fill_(torch.arange(z.shape[-1]) == 30, -1e30),
        lambda z: F.leaky_relu(z),
        lambda z: z + 1e-3 * z.sin(),
        lambda z: 30 * torch.sin(z / 30),
        lambda z: 30 * z / (30 + z.abs()),
        lambda z: z * torch.nan,
        lambda z: z * nn.Parameter(torch.tensor(0.5)),
        lambda z: z.bfloat16(),
    ],
)
def test_anything_else_is_noticed(bend: Bend, bent: Callable[..., PreTrainedModel]) -> None:
    read = head_input(bent(bend), input_ids=IDS)
    assert read is not None
    assert read.rule is None


def test_what_reaches_the_head_is_what_makes_the_logits(bent: Callable[..., PreTrainedModel]) -> None:
    model = bent(lambda z: z)
    read = head_input(model, input_ids=IDS, logits_to_keep=torch.tensor([0, 2]))
    assert read is not None
    torch.testing.assert_close(output_head(model)(read.hidden), model(input_ids=IDS).logits[:, [0, 2]])


def test_hooks_on_the_head_count_as_part_of_the_model(bent: Callable[..., PreTrainedModel]) -> None:
    model = bent(lambda z: z)
    output_head(model).register_forward_hook(lambda *arguments: arguments[-1] * 2)
    output_head(model).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    read = head_input(model, input_ids=IDS)
    assert read is not None
    assert read.rule == LogitRule(2.0)
    logits = F.linear(read.hidden, model.get_parameter("lm_head.weight")) * 2
    torch.testing.assert_close(logits, model(input_ids=IDS).logits)


def test_own_logits_are_those_of_the_whole_pass(bent: Callable[..., PreTrainedModel]) -> None:
    model = bent(lambda z: z.log_softmax(-1)[..., :-1])
    read = head_input(model, input_ids=IDS)
    assert read is not None
    torch.testing.assert_close(own_logits(model, read.hidden[1]), model(input_ids=IDS).logits[1])


def test_a_head_that_is_not_called_once_is_none(bent: Callable[..., PreTrainedModel]) -> None:
    model = bent(lambda z: z)
    original = model.forward

    def twice(**kwargs: Any) -> Any:
        original(**kwargs)
        return original(**kwargs)

    model.forward = twice
    assert head_input(model, input_ids=IDS) is None


def test_the_head_is_put_back_whatever_happens(bent: Callable[..., PreTrainedModel]) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("broken on purpose")

    model = bent(fail)
    head = output_head(model)
    for own in (None, torch.neg):  # a layer whose own forward was replaced before keeps that
        if own:
            vars(head)["forward"] = own
        with pytest.raises(RuntimeError, match="on purpose"):
            head_input(model, input_ids=IDS)
        assert vars(head).get("forward") is own
